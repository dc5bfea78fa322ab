"""Triton's config: what the `config.pbtxt` of a model says that `describe` would have to guess.

States go over as they are. Control inputs do not: a session's server begins it from its initial state, so START is
always false where a run proves that this comes to the same, READY is always true, and an id tells a model nothing.
What has no place here is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf import text_format
from onnx import helper

from ntm.tensor import Array
from server.errors import ModelFileError
from server.model.describe import Hints
from server.rpc.inference import grpc_service_pb2 as pb

_Control = pb.ModelSequenceBatching.Control
_CARRIED = {
    *("name", "platform", "backend", "max_batch_size", "input", "output", "sequence_batching"),
    "default_model_filename",
}
_ELSEWHERE = {
    "version_policy": "every version in the models directory is served",
    "instance_group": "--device chooses where models run",
    "dynamic_batching": "sessions are always run together; --max-batch-size bounds it",
    "ensemble_scheduling": "a model calls no others",
    "model_warmup": "every model is tried out before it is served",
}


_MOST_DEPTH = 32
"""A config has seven; the parser goes as deep as the text does."""


@dataclass(frozen=True)
class TritonModel:
    """What a Triton model directory says of its model."""

    name: str
    file: Path
    hints: Hints
    carried: list[str]
    """What became of its control inputs, a sentence each."""
    left: list[str]
    """What could not be carried over, a sentence each."""


def read(path: Path, file: Path | None = None) -> TritonModel:
    """Read a `config.pbtxt`, and the model file of the newest version beside it if none is given.

    Raises:
        ModelFileError: it is no such config, its model is no ONNX file, or the model cannot be served as it is.
    """
    try:
        fields = [*_fields(path.read_text(encoding="utf-8"))]
        if not fields:
            raise ModelFileError(str(path), ["it is not a Triton model config: it has no fields"])
        # Some of what is dropped is written in ways that cannot be skipped.
        carried = "".join(text for name, text in fields if name in _CARRIED)
        config = text_format.Parse(carried, pb.ModelConfig(), allow_unknown_field=True)
    except (OSError, ValueError, RecursionError, text_format.ParseError) as error:
        raise ModelFileError(str(path), [f"it is not a Triton model config: {error}"]) from error
    if config.platform not in ("", "onnxruntime_onnx") or config.backend not in ("", "onnxruntime"):
        kind = config.backend or config.platform
        raise ModelFileError(
            str(path), [f"its model is one for {kind!r}: export it as ONNX, and name that file"]
        )
    file = file or _newest(path, config.default_model_filename or "model.onnx")
    return _Carrying(path, config, file, {name for name, _ in fields}).model()


def _newest(path: Path, file_name: str) -> Path:
    versions = [d for d in path.parent.iterdir() if d.name.isdecimal() and (d / file_name).is_file()]
    if not versions:
        raise ModelFileError(str(path), [f"there is no VERSION/{file_name} beside it: name the ONNX file"])
    return max(versions, key=lambda directory: int(directory.name)) / file_name


class _Carrying:
    def __init__(self, path: Path, config: pb.ModelConfig, file: Path, fields: set[str]) -> None:
        self._path, self._config, self._file, self._fields = path, config, file, fields
        try:
            self._graph = onnx.load(file).graph
        except Exception as error:  # onnx, protobuf and the file system each have their own
            raise ModelFileError(str(file), [f"it is not a valid ONNX file: {error}"]) from error
        self._values = {value.name: value for value in self._graph.input}
        self._axes = {tensor.name: self._open_axes(tensor.name, tensor.dims) for tensor in config.input} | {
            state.input_name: self._open_axes(state.input_name, state.dims)
            for state in config.sequence_batching.state
        }
        self._initial = {s.input_name: self._initial_of(s) for s in config.sequence_batching.state}
        self._carried: list[str] = []
        self._left: list[str] = []

    def model(self) -> TritonModel:
        config, batching = self._config, self._config.sequence_batching
        controls = {control.name: control.control[0] for control in batching.control_input if control.control}
        states = {state.input_name: state.output_name for state in batching.state}
        constants = self._constants(controls)
        sent = [name for name in controls if name not in constants]
        inputs: dict[str, Any] = dict.fromkeys([*(t.name for t in config.input), *sent], "step")
        self._left += [
            f"{name}: {_ELSEWHERE.get(name, 'it has no counterpart')}"
            for name in sorted(self._fields - _CARRIED)
        ]
        if batching.max_sequence_idle_microseconds:
            idle_s = batching.max_sequence_idle_microseconds / 1e6
            self._left.append(
                f"max_sequence_idle_microseconds: one for the server, --sequence-idle-s {idle_s:g}"
            )
        hints = Hints(
            axes={name: axes for name, axes in self._axes.items() if axes},
            states=states,
            constants=constants,
            initial=self._initial,
            inputs=inputs,
            outputs=[tensor.name for tensor in config.output],
        )
        name = config.name or self._path.parent.resolve().name
        return TritonModel(name, self._file, hints, self._carried, self._left)

    def _constants(self, controls: Mapping[str, pb.ModelSequenceBatching.Control]) -> dict[str, str]:
        """Control inputs that never change, by name; the others come with every step."""
        constants, read_names = {}, {*_names_read(self._graph)}
        for name, control in controls.items():
            if name not in self._values:
                raise ModelFileError(str(self._path), [f"control input {name!r} is no input of {self._file}"])
            kind, (no, yes) = control.kind, _false_true(control)
            is_read = name in read_names
            if kind == _Control.CONTROL_SEQUENCE_CORRID and is_read:
                problem = (
                    f"the model reads the id of its sequence ({name!r}, CORRID), which says nothing of a session that "
                    "can be forked, exported and named anew: export it without this input"
                )
                raise ModelFileError(str(self._path), [problem])
            if kind == _Control.CONTROL_SEQUENCE_READY:
                constants[name] = yes
                self._carried.append(f"{name!r} (READY) is always {yes}: only sessions that step are run")
            elif not is_read:
                constants[name] = no
                self._carried.append(f"{name!r} ({_kind(control)}) is always {no}: the model never reads it")
        for name, control in controls.items():
            if name in constants:
                continue
            no, yes = _false_true(control)
            if control.kind == _Control.CONTROL_SEQUENCE_START and self._begins_alike(
                controls, name, constants
            ):
                constants[name] = no
                self._carried.append(
                    f"{name!r} (START) is always {no}: a session begins from its initial state, and a reset mask sends "
                    "it back there; a run with START from any state gives the same"
                )
            else:
                self._left.append(
                    f"control input {name!r} ({_kind(control)}), which the model reads, is an input of every step: "
                    f"callers send {yes} where it is so, and {no} otherwise"
                )
        return constants

    def _begins_alike(
        self,
        controls: Mapping[str, pb.ModelSequenceBatching.Control],
        start: str,
        constants: Mapping[str, str],
    ) -> bool:
        """Whether START with whatever state comes to the same as the initial state without it."""
        generator = np.random.default_rng(0)
        any_state = {name: self._feed(name, generator) for name in self._values}
        for name, control in controls.items():
            any_state[name] = np.full_like(
                any_state[name], float(constants.get(name, _false_true(control)[0]))
            )
        initial = dict(any_state)
        for name, values in self._initial.items():
            initial[name] = np.zeros_like(any_state[name])
            if not isinstance(values, str):
                if values.size != initial[name].size:
                    problem = (
                        f"state {name!r} has {initial[name].size} elements, its initial values {values.size}"
                    )
                    raise ModelFileError(str(self._path), [problem])
                initial[name][...] = values.reshape(any_state[name].shape)
        any_state[start] = np.full_like(any_state[start], float(_false_true(controls[start])[1]))
        try:
            session = ort.InferenceSession(str(self._file), providers=["CPUExecutionProvider"])
            pairs = zip(session.run(None, any_state), session.run(None, initial), strict=True)
            return all(np.array_equal(one, other) for one, other in pairs)
        except Exception:  # ONNX Runtime raises types of its own; what cannot be run proves nothing
            return False

    def _feed(self, name: str, generator: np.random.Generator) -> Array:
        tensor_type = self._values[name].type.tensor_type
        axes = self._axes.get(name, {})
        shape = [d.dim_value or axes.get(axis, 1) for axis, d in enumerate(tensor_type.shape.dim)]
        values = generator.uniform(1, 2, shape)
        return values.astype(helper.tensor_dtype_to_np_dtype(tensor_type.elem_type))

    def _open_axes(self, name: str, dims: Iterable[int]) -> dict[int, int]:
        """Lengths that the graph leaves open and the config gives."""
        if name not in self._values:
            raise ModelFileError(str(self._path), [f"input {name!r} is no input of {self._file}"])
        shape = self._values[name].type.tensor_type.shape.dim
        lengths = [*dims]
        first = len(shape) - len(lengths)  # the batch axis, where max_batch_size is not 0
        return {
            first + axis: length
            for axis, length in enumerate(lengths)
            if length > 0 and first >= 0 and not shape[first + axis].HasField("dim_value")
        }

    def _initial_of(self, state: pb.ModelSequenceBatching.State) -> str | Array:
        """Zeros, or what the file says that the config names: raw elements, as Triton has them."""
        for initial in state.initial_state:
            if initial.data_file:
                path = self._path.parent / "initial_state" / initial.data_file
                element_type = self._values[state.input_name].type.tensor_type.elem_type
                try:
                    values = np.fromfile(path, helper.tensor_dtype_to_np_dtype(element_type))
                except (OSError, ValueError) as error:  # ValueError: no file can have this name
                    reason = getattr(error, "strerror", None) or str(error)
                    raise ModelFileError(str(self._path), [f"it names {str(path)!r}: {reason}"]) from error
                if values.size != np.prod([*initial.dims]):
                    problem = (
                        f"{path} has {values.size} elements, its dims {[*initial.dims]} say another number"
                    )
                    raise ModelFileError(str(self._path), [problem])
                return values
        return "zeros"


def _false_true(control: pb.ModelSequenceBatching.Control) -> tuple[str, str]:
    for values in (control.int32_false_true, control.fp32_false_true, control.bool_false_true):
        if len(values) == 2:
            return f"{float(values[0]):g}", f"{float(values[1]):g}"
    return "0", "1"


def _kind(control: pb.ModelSequenceBatching.Control) -> str:
    if control.kind not in _Control.Kind.values():
        return str(control.kind)
    return _Control.Kind.Name(control.kind).removeprefix("CONTROL_SEQUENCE_")


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """What the nodes of a graph read, and those of graphs within it."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names_read(inner)


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """The outermost fields of a message in text format, by name, as they are written."""
    depth, starts = 0, list[tuple[int, str]]()
    # Text in quotes as runs of what needs no backslash: a choice for each character takes memory for each.
    for found in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|#[^\n]*|[{}\[\]<>]|\w+(?=\s*[:{\[])', text):
        piece = found.group()
        if piece in "{[<":
            depth += 1
            if depth > _MOST_DEPTH:
                raise ValueError(f"it is nested deeper than {_MOST_DEPTH}")
        elif piece in "}]>":
            depth -= 1
        elif depth == 0 and piece[0] not in '"#':
            starts.append((found.start(), piece))
    for (start, name), (end, _) in pairwise([*starts, (len(text), "")]):
        yield name, text[start:end]
