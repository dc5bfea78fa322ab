"""Spec: read what a model file declares of itself, and hold it against the graph.

A `StepModel` that leaves here can be served: its spec and its graph agree in every name, dtype and shape.
`repository.py` finds the files; `graphs.py` derives from the graph what the device runs.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import helper

from ntm.tensor import Array, TensorError, data_type, numpy_dtype, to_array, type_name
from ntm.v1 import model_pb2, tensor_pb2
from server.errors import InvalidInputError, ModelFileError
from server.model.layout import StepLayout

METADATA_KEY = "ntm.v1.ModelSpec"
SIDECAR_NAME = "model_spec.json"
NOT_TEXT = "it has names that are not text in UTF-8: export it anew"


@dataclass(frozen=True)
class StepModel:
    """One version of a model, read and checked."""

    name: str
    version: int
    digest: str
    """SHA-256 of the model file, in hexadecimal."""
    spec: model_pb2.ModelSpec
    step: onnx.ModelProto

    @property
    def label(self) -> str:
        """Name and version, as people write them."""
        return f"{self.name}/{self.version}"

    @property
    def input_tensors(self) -> Sequence[model_pb2.TensorSpec]:
        """What a step takes."""
        return self.spec.inputs

    @property
    def output_tensors(self) -> Sequence[model_pb2.TensorSpec]:
        """What a step gives."""
        return self.spec.outputs

    @cached_property
    def inputs(self) -> StepLayout:
        """How the inputs of a step stand in its bytes."""
        return StepLayout(self.input_tensors, has_reset=True)

    @cached_property
    def outputs(self) -> StepLayout:
        """How the outputs of a step stand in its bytes."""
        return StepLayout(self.output_tensors)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of output of one step."""
        return sum(math.prod(t.shape) * numpy_dtype(t.dtype).itemsize for t in self.output_tensors)

    @property
    def state_bytes(self) -> int:
        """Bytes of state of one session."""
        return sum(math.prod(s.shape) * numpy_dtype(s.dtype).itemsize for s in self.spec.states)


def load(path: Path, name: str, version: int) -> StepModel:
    """Read and check one model file.

    Raises:
        ModelFileError: it is not an ONNX file, has no spec, or spec and graph disagree; all reasons are listed.
    """
    for file in (path, path.with_name(SIDECAR_NAME)):
        if file.exists() and not file.is_file():
            raise ModelFileError(str(path), [f"{file.name} is not a file: a directory, a pipe or a device"])
    try:
        content = path.read_bytes()
        step = onnx.load(path)
        # By its path: the checker would serialise `step` again, and hold up every other thread for as long.
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # onnx, protobuf and the file system each have their own
        raise ModelFileError(str(path), [f"it is not a valid ONNX file: {_first_line(error)}"]) from error
    if not is_text(step):
        raise ModelFileError(str(path), [NOT_TEXT])
    spec = _read_spec(path, step)
    problems = list(differences(spec, step.graph))
    if problems:
        raise ModelFileError(str(path), problems)
    return StepModel(name, version, hashlib.sha256(content).hexdigest(), spec, step)


def initial_value(state: model_pb2.StateSpec) -> Array:
    """The value a new session starts from, [shape] of a checked spec; 0 for a session input that has none."""
    if state.WhichOneof("initial") == "values":
        return to_array(state.values)
    return np.full(tuple(state.shape), state.fill, dtype=numpy_dtype(state.dtype))


def is_session_input(state: model_pb2.StateSpec) -> bool:
    """Whether no step changes it."""
    return not state.output_name


def initial_state(spec: model_pb2.ModelSpec, given: Mapping[str, Array]) -> dict[str, Array]:
    """Values that a session is to begin from, by name, in the API's axes, checked: the same in the graph's axes.

    Raises:
        InvalidInputError: a name, a shape or a dtype is not the model's, a value is not finite, or a session input that
            has no initial value is missing.
    """
    states = {state.input_name: state for state in spec.states}
    for name, array in given.items():
        field = f"initial_state[{name}]"
        if name not in states:
            raise InvalidInputError(field, f"it is no state of this model: it has {', '.join(states)}")
        state = states[name]
        if array.dtype != numpy_dtype(state.dtype):
            raise InvalidInputError(
                f"{field}.dtype", f"{type_name(data_type(array.dtype))} must be {type_name(state.dtype)}"
            )
        if array.shape != api_shape(state):
            raise InvalidInputError(f"{field}.shape", f"{list(array.shape)} must be {list(api_shape(state))}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InvalidInputError(f"{field}.raw", "it has values that are not finite")
    for name, state in states.items():
        if state.WhichOneof("initial") is None and name not in given:
            raise InvalidInputError(
                "initial_state", f"session input {name!r} has no value of its own: give one"
            )
    # `ascontiguousarray` would give an array of rank 0 an axis.
    return {name: np.asarray(from_api(states[name], array), order="C") for name, array in given.items()}


def api_shape(state: model_pb2.StateSpec) -> tuple[int, ...]:
    """The shape in which the API shows a state tensor."""
    return tuple(state.shape[axis] for axis in _api_axes(state))


def to_api(state: model_pb2.StateSpec, array: Array, num_leading_axes: int = 0) -> Array:
    """A state tensor of one session, as the graph has it, as the API shows it; or several, behind leading axes."""
    leading = range(num_leading_axes)
    return array.transpose([*leading, *(num_leading_axes + axis for axis in _api_axes(state))])


def from_api(state: model_pb2.StateSpec, array: Array) -> Array:
    """A state tensor of one session, as the API shows it, as the graph has it."""
    return array.transpose(np.argsort(_api_axes(state)))


def _api_axes(state: model_pb2.StateSpec) -> list[int]:
    return list(state.api_axes) or list(range(len(state.shape)))


def is_text(message: Message) -> bool:
    """Whether every string in a message is text: ONNX's are of a protobuf that lets anything pass, and gives bytes."""
    if isinstance(message, onnx.TensorProto):  # not its elements, which are many
        return isinstance(message.name, str)
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == FieldDescriptor.TYPE_STRING and not all(isinstance(each, str) for each in values):
            return False
        if field.type == FieldDescriptor.TYPE_MESSAGE and not all(map(is_text, values)):
            return False
    return True


def _read_spec(path: Path, step: onnx.ModelProto) -> model_pb2.ModelSpec:
    sidecar = path.with_name(SIDECAR_NAME)
    texts = [entry.value for entry in step.metadata_props if entry.key == METADATA_KEY]
    if texts:
        source, text = f"the metadata {METADATA_KEY}", texts[0]
    elif sidecar.exists():
        source, text = SIDECAR_NAME, sidecar.read_text(encoding="utf-8", errors="replace")
    else:
        raise ModelFileError(
            str(path),
            [
                f"it has no spec: neither the metadata {METADATA_KEY}, which `python -m export` writes, "
                f"nor a {SIDECAR_NAME} beside it (protos/ntm/v1/model.proto says what goes in)"
            ],
        )
    try:
        return json_format.Parse(text, model_pb2.ModelSpec())
    except json_format.ParseError as error:
        problem = f"{source} is not a ModelSpec: {_first_line(error)}"
        if re.search(r'no field named "(input|output)"', str(error)):
            problem = (
                f"{source} is of an older version, which knew one `input` and one `output`: export the model anew, or "
                'write "inputs": [{...}] and "outputs": [{...}]'
            )
        raise ModelFileError(str(path), [problem]) from error


def differences(spec: model_pb2.ModelSpec, graph: onnx.GraphProto) -> Iterator[str]:
    """Everything in which a spec is incomplete or disagrees with its graph, a sentence each."""
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in initializers}
    outputs = {value.name: value for value in graph.output}

    for tensors, kind, values in ((spec.inputs, "input", inputs), (spec.outputs, "output", outputs)):
        if not tensors:
            yield f"the spec has no {kind}s: a step takes at least one and gives at least one"
        for tensor in tensors:
            yield from _tensor_differences(kind, tensor.name, tensor, values)
    if not any(state.output_name for state in spec.states):
        yield "the spec has no states that a step changes: without any, each step stands alone and needs no session"
    for state in spec.states:
        yield from _tensor_differences("input", state.input_name, state, inputs)
        if state.output_name:
            yield from _tensor_differences("output", state.output_name, state, outputs)
            yield from _growth(state, inputs, outputs)
        yield from _state_problems(state)
    for constant in spec.constants:
        yield from _constant_differences(constant, inputs)

    declared_inputs = [
        *(tensor.name for tensor in spec.inputs),
        *(state.input_name for state in spec.states),
        *(constant.name for constant in spec.constants),
    ]
    state_outputs = [state.output_name for state in spec.states if state.output_name]
    for name in sorted({name for name in state_outputs if state_outputs.count(name) > 1}):
        yield f"the spec declares output {name!r} as the next value of more than one state"
    declared_outputs = [tensor.name for tensor in spec.outputs]
    for names, kind in ((declared_inputs, "input"), (declared_outputs, "output")):
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"the spec declares {kind} {name!r} more than once"
    # An output that nobody declared is computed by the graph and dropped; an input has to come from somewhere.
    for name in sorted(set(inputs) - set(declared_inputs)):
        yield f"graph input {name!r} is not in the spec"
    for name in sorted([*inputs, *outputs]):
        if name.startswith("ntm."):
            yield f"the name {name!r} begins with 'ntm.', which the server keeps for itself"


def _tensor_differences(
    kind: str,
    name: str,
    tensor: model_pb2.TensorSpec | model_pb2.StateSpec,
    values: dict[str, onnx.ValueInfoProto],
) -> Iterator[str]:
    """Differences of one declared input or output, with its batch axis, from the graph's."""
    where = f"{kind} {name!r}"
    try:
        dtype = numpy_dtype(tensor.dtype)
    except TensorError as error:
        yield f"{where}: {error}"
        return
    rank = graph_rank(tensor)
    if not -1 <= tensor.batch_axis <= len(tensor.shape):
        yield (
            f"{where}: batch_axis {tensor.batch_axis} is outside its {rank} axes; where the graph has no batch axis, "
            "say -1"
        )
        return
    if any(length < 1 for length in tensor.shape):
        yield f"{where}: shape {list(tensor.shape)} has an axis below 1"
    if name not in values:
        yield f"{where} is in the spec but not in the graph, which has {', '.join(sorted(values)) or 'none'}"
        return
    if values[name].type.WhichOneof("value") != "tensor_type":
        yield f"{where} is no tensor in the graph"
        return
    tensor_type = values[name].type.tensor_type
    if tensor_type.elem_type != helper.np_dtype_to_tensor_dtype(dtype):
        yield (
            f"{where} is {type_name(tensor.dtype)} in the spec and "
            f"{_graph_type_name(tensor_type.elem_type)} in the graph"
        )
    if not tensor_type.HasField("shape"):
        return  # the graph leaves it all open
    axes = list(tensor_type.shape.dim)
    if len(axes) != rank:
        has_batch = ", batch included," if tensor.batch_axis >= 0 else ""
        yield f"{where} has {rank} axes in the spec{has_batch} and {len(axes)} in the graph"
        return
    if tensor.batch_axis >= 0:
        batch = axes.pop(tensor.batch_axis)
        if batch.HasField("dim_value") and batch.dim_value != 1:
            yield (
                f"{where}: the graph fixes its batch axis {tensor.batch_axis} to {batch.dim_value}; name another "
                "axis, export the step for a batch of 1 or any, or say batch_axis -1 where the graph has none"
            )
    shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in axes]
    # What the graph leaves open takes its length from the spec.
    if any(isinstance(a, int) and a != b for a, b in zip(shape, tensor.shape, strict=True)):
        yield f"{where} has shape {list(tensor.shape)} in the spec and {shape} in the graph, batch left out"


def graph_rank(tensor: model_pb2.TensorSpec | model_pb2.StateSpec) -> int:
    """How many axes the graph has for a tensor."""
    return len(tensor.shape) + (tensor.batch_axis >= 0)


def graph_shape(tensor: model_pb2.TensorSpec | model_pb2.StateSpec) -> tuple[int, ...]:
    """Its shape in the graph for one session."""
    shape = list(tensor.shape)
    if tensor.batch_axis >= 0:
        shape.insert(tensor.batch_axis, 1)
    return tuple(shape)


def _growth(
    state: model_pb2.StateSpec,
    inputs: dict[str, onnx.ValueInfoProto],
    outputs: dict[str, onnx.ValueInfoProto],
) -> Iterator[str]:
    """Whether the graph says that a state's next value is of another size."""
    if state.input_name not in inputs or state.output_name not in outputs:
        return
    old, new = (
        [axis.dim_value if axis.HasField("dim_value") else -1 for axis in value.type.tensor_type.shape.dim]
        for value in (inputs[state.input_name], outputs[state.output_name])
    )
    if len(old) == len(new) and any(a != b and -1 not in (a, b) for a, b in zip(old, new, strict=True)):
        yield growing(state, old, new)


def growing(state: model_pb2.StateSpec, old: Sequence[int], new: Sequence[int]) -> str:
    """That a state does not keep its size, as a problem."""
    return (
        f"state {state.input_name!r} is growing: it goes in as {list(old)} and its next value {state.output_name!r} "
        f"comes out as {list(new)}; a session's state has one size from its beginning to its end, so export a step "
        "whose caches have a fixed length"
    )


def _state_problems(state: model_pb2.StateSpec) -> Iterator[str]:
    where = f"state {state.input_name!r}"
    if state.role == model_pb2.STATE_ROLE_UNSPECIFIED:
        yield f"{where} has no role: use STATE_ROLE_OTHER where none fits"
    if state.api_axes and sorted(state.api_axes) != list(range(len(state.shape))):
        yield f"{where}: api_axes {list(state.api_axes)} is not an order of its {len(state.shape)} axes"
    initial = state.WhichOneof("initial")
    if initial == "fill" and not math.isfinite(state.fill):
        yield f"{where}: its initial value {state.fill} is not finite"
    if initial is None and state.output_name:
        yield f"{where} has no initial value: give fill or values"
    if initial == "values":
        try:
            to_array(state.values)
        except TensorError as error:
            yield f"{where}: its initial values are damaged: {error}"
        else:
            if not np.isfinite(to_array(state.values)).all():
                yield f"{where}: its initial values are not all finite"
        if (state.values.dtype, list(state.values.shape)) != (state.dtype, list(state.shape)):
            yield (
                f"{where}: its initial values are {_describe(state.values.dtype, state.values.shape)}, "
                f"the state is {_describe(state.dtype, state.shape)}"
            )


def _constant_differences(
    constant: model_pb2.ConstantSpec, inputs: dict[str, onnx.ValueInfoProto]
) -> Iterator[str]:
    where = f"constant {constant.name!r}"
    try:
        value = to_array(constant.value)
    except TensorError as error:
        yield f"{where}: its value is damaged: {error}"
        return
    if constant.name not in inputs:
        yield f"{where} is not an input of the graph"
        return
    tensor_type = inputs[constant.name].type.tensor_type
    if tensor_type.elem_type != helper.np_dtype_to_tensor_dtype(value.dtype):
        yield (
            f"{where} is {type_name(constant.value.dtype)} in the spec and "
            f"{_graph_type_name(tensor_type.elem_type)} in the graph"
        )
    shape = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor_type.shape.dim]
    if len(shape) != value.ndim or any(a not in (-1, b) for a, b in zip(shape, value.shape, strict=True)):
        yield f"{where} has shape {list(value.shape)} in the spec and {shape} in the graph (-1: any)"


def _graph_type_name(element_type: int) -> str:
    try:
        return type_name(data_type(helper.tensor_dtype_to_np_dtype(element_type)))
    except (TensorError, KeyError):
        return str(onnx.TensorProto.DataType.Name(element_type))


def _describe(dtype: tensor_pb2.DataType.ValueType, shape: Iterable[int]) -> str:
    return f"{type_name(dtype)} {list(shape)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
