"""Tensors on the wire: the one place where a `Tensor` message becomes a numpy array and back.

Elements travel row-major and little-endian (KServe v2's raw contents), so on the little-endian machines
this project runs on a message and an array share their bytes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ntm.v1 import tensor_pb2

Array = npt.NDArray[Any]

_DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_BOOL: np.dtype(np.bool_),
    tensor_pb2.DATA_TYPE_UINT8: np.dtype(np.uint8),
    tensor_pb2.DATA_TYPE_INT8: np.dtype(np.int8),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_FP16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_FP32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FP64: np.dtype("<f8"),
    tensor_pb2.DATA_TYPE_INT16: np.dtype("<i2"),
    tensor_pb2.DATA_TYPE_UINT16: np.dtype("<u2"),
    tensor_pb2.DATA_TYPE_UINT32: np.dtype("<u4"),
    tensor_pb2.DATA_TYPE_UINT64: np.dtype("<u8"),
}
_MAX_AXES = 64
"""Of a numpy array."""
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


class TensorError(ValueError):
    """A `Tensor` message, or a dtype, that does not describe an array; `field` names what is wrong in it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def numpy_dtype(data_type: tensor_pb2.DataType.ValueType) -> np.dtype[Any]:
    """The numpy dtype of a wire type; raises TensorError for an unknown or unspecified one."""
    try:
        return _DTYPES[data_type]
    except KeyError:
        raise TensorError("dtype", f"dtype {data_type} is unknown: use one of {_names()}") from None


def data_type(dtype: npt.DTypeLike) -> tensor_pb2.DataType.ValueType:
    """The wire type of a numpy dtype; raises TensorError when there is none."""
    try:
        return _DATA_TYPES[np.dtype(dtype)]
    except KeyError:
        raise TensorError(
            "dtype", f"numpy dtype {np.dtype(dtype)} cannot be sent: use one of {_names()}"
        ) from None


def to_message(array: Array) -> tensor_pb2.Tensor:
    """An array as a message; raises TensorError for a dtype that has no wire type."""
    message = tensor_pb2.Tensor()
    fill(message, array)
    return message


def fill(message: tensor_pb2.Tensor, array: Array) -> None:
    """Put an array into an empty message, such as a field; raises TensorError for a dtype that has no wire type."""
    message.dtype = data_type(array.dtype)
    message.shape.extend(array.shape)
    message.raw = array.tobytes()


def to_array(tensor: tensor_pb2.Tensor) -> Array:
    """A message as a read-only array over its bytes.

    Raises:
        TensorError: the dtype is unknown, an axis is negative, there are too many axes, or the bytes are too few,
            too many, or neither 0 nor 1 in a boolean.
    """
    dtype = numpy_dtype(tensor.dtype)
    if len(tensor.shape) > _MAX_AXES:
        raise TensorError("shape", f"shape has {len(tensor.shape)} axes: at most {_MAX_AXES} make an array")
    shape = tuple(tensor.shape)
    if min(shape, default=0) < 0:
        raise TensorError("shape", f"shape {list(shape)} has a negative axis")
    expected_bytes, raw = math.prod(shape) * dtype.itemsize, tensor.raw
    if len(raw) != expected_bytes:
        raise TensorError(
            "raw",
            f"raw has {len(raw)} bytes, but shape {list(shape)} of {type_name(tensor.dtype)} "
            f"takes {expected_bytes}",
        )
    flat = np.frombuffer(raw, dtype=dtype)
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise TensorError("raw", "raw has a byte that is neither 0 nor 1, in a BOOL tensor")
    try:
        return flat.reshape(shape)
    except ValueError as error:  # too many axes, or one too long
        raise TensorError("shape", f"shape {list(shape)} is not that of an array: {error}") from error


def type_name(data_type: tensor_pb2.DataType.ValueType) -> str:
    """A wire type as people write it, such as "FP32"; its number where it is none."""
    try:
        return tensor_pb2.DataType.Name(data_type).removeprefix("DATA_TYPE_")
    except ValueError:
        return str(data_type)


def _names() -> str:
    return ", ".join(type_name(data_type) for data_type in _DTYPES)
