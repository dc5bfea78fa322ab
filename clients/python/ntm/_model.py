"""The model as its callers see it: which arrays fit it, and how many steps a message may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ntm._steps import RESETS, Inputs, structured
from ntm.tensor import Array, numpy_dtype
from ntm.v1 import model_pb2, model_service_pb2, tensor_pb2

# What the server sets aside in a message for all but tensors.
_ENVELOPE_BYTES = 64 * 1024


class Model:
    """What the client knows of a model: the shapes and limits that its calls need."""

    def __init__(self, info: model_service_pb2.GetModelResponse) -> None:
        self.info = info
        self.spec: model_pb2.ModelSpec = info.spec
        self._inputs = {tensor.name: tensor for tensor in info.spec.inputs}
        outputs = [
            (tensor.name, numpy_dtype(tensor.dtype), tuple(tensor.shape)) for tensor in info.spec.outputs
        ]
        self._output_dtype = np.dtype(outputs) if len(outputs) > 1 else np.dtype(outputs[0][1])
        self._output_shape = () if len(outputs) > 1 else outputs[0][2]
        self._step_bytes = max(_num_bytes(info.spec.inputs) + 1, _num_bytes(info.spec.outputs))

    def inputs(self, values: Inputs, num_leading_axes: int = 1, resets: npt.ArrayLike | None = None) -> Array:
        """Values as one array of steps, [T] or with one input [T, ...input shape], for one leading axis.

        Args:
            values: an array for a model of one input, a dict of arrays for one of several.
            num_leading_axes: 1 for [T], 2 for [S, T].
            resets: with these axes, which steps begin from the session's initial state; None: none does.

        Raises:
            ValueError: an input is missing or unknown, or has another shape, a type of another kind, or integers that
                do not fit.
        """
        if not isinstance(values, Mapping):
            if len(self._inputs) > 1:
                raise ValueError(f"the model takes {', '.join(self._inputs)}: send a dict of arrays")
            [tensor] = self._inputs.values()
            array = _converted(values, tensor, "inputs", num_leading_axes)
            if resets is None:
                return array
            tensors = {tensor.name: array}
        else:
            if set(values) != set(self._inputs):
                raise ValueError(f"inputs are {', '.join(values)}: send {', '.join(self._inputs)}")
            tensors = {
                name: _converted(values[name], tensor, f"inputs {name!r}", num_leading_axes)
                for name, tensor in self._inputs.items()
            }
            if len(tensors) == 1 and resets is None:
                return next(iter(tensors.values()))
        leading = next(iter(tensors.values())).shape[:num_leading_axes]
        if resets is not None:
            tensors[RESETS] = np.asarray(resets, np.bool_)
        for name, array in tensors.items():
            if array.shape[:num_leading_axes] != leading:
                what = "resets" if name == RESETS else f"inputs {name!r}"
                raise ValueError(
                    f"{what} have shape {array.shape}: send {list(leading)} steps, as for the others"
                )
        return structured(tensors, num_leading_axes)

    def initial_state(self, values: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """Values of states by name, [...state shape] each, as arrays of their dtypes.

        Raises:
            ValueError: there is no such state, or a value has a type of another kind.
        """
        states = {state.input_name: state for state in self.spec.states}
        for name in values:
            if name not in states:
                raise ValueError(f"{name!r} is no state of the model: it has {', '.join(states)}")
        return {name: _cast(np.asarray(value), states[name].dtype, name) for name, value in values.items()}

    def chunks(self, inputs: Array, traced: Sequence[str] = ()) -> Iterator[Array]:
        """Inputs cut into as few messages as the server's limits allow, whose answers also have some states."""
        limits = self.info.limits
        state_bytes = _num_bytes([state for state in self.spec.states if state.input_name in traced])
        fitting = (limits.max_message_bytes - _ENVELOPE_BYTES) // (self._step_bytes + state_bytes)
        size = max(1, min(limits.max_steps_per_message, fitting))
        for start in range(0, len(inputs), size):
            yield inputs[start : start + size]

    def no_outputs(self, *axes: int) -> Array:
        """Outputs of steps [*axes], all zero."""
        return np.zeros((*axes, *self._output_shape), self._output_dtype)

    def join(self, outputs: Sequence[Array]) -> Array:
        """The outputs of several messages as one array."""
        return np.concatenate([self.no_outputs(0), *outputs])

    def state_names(self, names: Sequence[str]) -> list[str]:
        """The names asked for, or all."""
        return list(names) or [state.input_name for state in self.spec.states]


def _converted(
    values: npt.ArrayLike, tensor: model_pb2.TensorSpec, what: str, num_leading_axes: int
) -> Array:
    array, shape = np.asarray(values), tuple(tensor.shape)
    if array.ndim != num_leading_axes + len(shape) or array.shape[num_leading_axes:] != shape:
        leading = ["T"] if num_leading_axes == 1 else ["S", "T"]
        wanted = ", ".join([*leading, *map(str, shape)])
        raise ValueError(f"{what} have shape {array.shape}: send [{wanted}]")
    return _cast(array, tensor.dtype, what)


def _cast(array: Array, data_type: tensor_pb2.DataType.ValueType, what: str) -> Array:
    dtype = numpy_dtype(data_type)
    from_integers = array.dtype.kind in "bui" and dtype.kind == "f"
    if not from_integers and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"{what} are {array.dtype}: send {dtype}")
    converted = array.astype(dtype, copy=False)
    if dtype.kind in "iu" and not np.array_equal(converted, array):
        raise ValueError(f"{what} have values that do not fit in {dtype}")
    return converted


def _num_bytes(tensors: Sequence[model_pb2.TensorSpec] | Sequence[model_pb2.StateSpec]) -> int:
    return sum(int(np.prod(tensor.shape)) * numpy_dtype(tensor.dtype).itemsize for tensor in tensors)
