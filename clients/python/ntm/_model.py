"""The model as its callers see it: which arrays fit it, and how many steps a message may hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ntm.tensor import Array, numpy_dtype
from ntm.v1 import model_pb2, model_service_pb2

# What the server sets aside in a message for all but tensors.
_ENVELOPE_BYTES = 64 * 1024


class Model:
    """What the client knows of a model: the shapes and limits that its calls need."""

    def __init__(self, info: model_service_pb2.GetModelResponse) -> None:
        self.info = info
        self.spec: model_pb2.ModelSpec = info.spec
        self.input_dtype = numpy_dtype(info.spec.inputs[0].dtype)
        self.output_dtype = numpy_dtype(info.spec.outputs[0].dtype)

    def inputs(self, values: npt.ArrayLike, num_leading_axes: int = 1) -> Array:
        """Values as an array of the input's dtype, [T, ...input shape] with one leading axis.

        Raises:
            ValueError: they have another shape, a type of another kind, or integers that do not fit.
        """
        array = np.asarray(values)
        shape = tuple(self.spec.inputs[0].shape)
        if array.ndim != num_leading_axes + len(shape) or array.shape[num_leading_axes:] != shape:
            leading = ["T"] if num_leading_axes == 1 else ["S", "T"]
            wanted = ", ".join([*leading, *map(str, shape)])
            raise ValueError(f"inputs have shape {array.shape}: send [{wanted}]")
        from_integers = array.dtype.kind in "bui" and self.input_dtype.kind == "f"
        if not from_integers and not np.can_cast(array.dtype, self.input_dtype, "same_kind"):
            raise ValueError(f"inputs are {array.dtype}: send {self.input_dtype}")
        converted = array.astype(self.input_dtype, copy=False)
        if self.input_dtype.kind in "iu" and not np.array_equal(converted, array):
            raise ValueError(f"inputs have values that do not fit in {self.input_dtype}")
        return converted

    def chunks(self, inputs: Array) -> Iterator[Array]:
        """Inputs cut into as few messages as the server's limits allow."""
        limits = self.info.limits
        input_bytes = math.prod(self.spec.inputs[0].shape) * self.input_dtype.itemsize
        output_bytes = math.prod(self.spec.outputs[0].shape) * self.output_dtype.itemsize
        fitting = (limits.max_message_bytes - _ENVELOPE_BYTES) // max(input_bytes, output_bytes)
        size = max(1, min(limits.max_steps_per_message, fitting))
        for start in range(0, len(inputs), size):
            yield inputs[start : start + size]

    def join(self, outputs: Sequence[Array]) -> Array:
        """The outputs of several messages as one array, [T, ...output shape]."""
        empty = np.empty((0, *self.spec.outputs[0].shape), self.output_dtype)
        return np.concatenate([empty, *outputs])

    def state_names(self, names: Sequence[str]) -> list[str]:
        """The names asked for, or all."""
        return list(names) or [state.input_name for state in self.spec.states]
