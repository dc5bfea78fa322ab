"""Describe: draft the spec of a step that somebody else exported, and say how sure each part of it is.

The graph says which tensors go in and come out. Which output is the next value of which input follows from names
(h and hn, x_in and x_out, x and next_x), else from shapes that fit once only, else from their order. Where the batch
axis of each stands, and what the graph leaves open, is found out by runs of it. What nobody can know, such as how long
a frame is, has to be told.

Shapes are those of the graph: a length, or None where it is open.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from ntm.tensor import Array, TensorError, data_type, numpy_dtype, to_message
from ntm.v1 import model_pb2
from server.errors import ModelFileError
from server.model.spec import NOT_TEXT, is_text

SESSION = "session"
_MOST_TRIALS = 64
_BATCH_NAMES = re.compile(r"(?i)^(n|b|bs|batch.*|.*batch|num_?envs?)$")
_AFFIXES = r"next|new|prev|old|cur|current|past|present|in|out|n|o|i|t|t1"
_PREFIX = re.compile(rf"(?i)^({_AFFIXES})[_./-]+(?=.)")
_SUFFIX = re.compile(rf"(?i)(?<=.)[_./-]+({_AFFIXES})$")
# hn, h_n, stateN, hout, cn; h0, but not the last digit of h10
_GLUED = re.compile(r"(?<=[A-Za-z0-9])(n|N|_n|out|Out|in|In|next|Next|new|New|'|_|(?<=[A-Za-z])0)$")

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Hints:
    """What somebody who knows the model says of it."""

    axes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Lengths of open axes, by tensor and axis; the axis -1 is the last open one."""
    states: Mapping[str, str] = field(default_factory=dict)
    """The output that is the next value of an input."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Values of inputs that never change."""
    initial: Mapping[str, str | Array] = field(default_factory=dict)
    """What states begin from: zeros, ones, a number, a .npy file, or the values."""
    inputs: Mapping[str, Literal["step", "session"]] = field(default_factory=dict)
    """Inputs that are those of a step, or of a session."""
    outputs: Sequence[str] = ()
    """The outputs that callers get; all that are no states if empty."""
    row_by_row: bool = False
    """Whether rows are to be run one after another, even if they could be run together."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph."""

    name: str
    dtype: np.dtype[np.generic]
    shape: Shape | None
    axis_names: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A spec, and what is behind it."""

    spec: model_pb2.ModelSpec
    rows: list[tuple[str, str, str, str]]
    """Of a table: input or output, name, type and shape, what it is taken for."""
    sure: list[str]
    guessed: list[str]
    missing: list[str]
    """What has to be told before the model can be served."""


def draft(path: Path, hints: Hints, name: str = "") -> Draft:
    """Draft the spec of a model file.

    Raises:
        ModelFileError: it is not an ONNX file, a hint fits nothing in it, or ONNX Runtime cannot run it.
    """
    return _Drafting(path, hints).draft(name or path.stem)


def input_names(path: Path) -> list[str]:
    """The names of a file's inputs.

    Raises:
        ModelFileError: it is not an ONNX file.
    """
    return [value.name for value in _read(path).graph.input]


class _Drafting:
    def __init__(self, path: Path, hints: Hints) -> None:
        self._path, self._hints = path, hints
        self._model = _read(path)
        graph = self._model.graph
        initializers = {tensor.name for tensor in graph.initializer}
        try:
            self._inputs = {v.name: _tensor(v) for v in graph.input if v.name not in initializers}
            self._outputs = {v.name: _tensor(v) for v in graph.output}
        except TensorError as error:
            raise ModelFileError(str(path), [str(error)]) from error
        self._sure: list[str] = []
        self._guessed: list[str] = []
        self._missing: list[str] = []
        self._lengths = {name: list(t.shape or ()) for name, t in self._inputs.items()}
        self._check_hints()

    def draft(self, name: str) -> Draft:
        constants = self._constants()
        pairs = self._pairs([name for name in self._inputs if name not in constants])
        session_inputs = [name for name, kind in self._hints.inputs.items() if kind == SESSION]
        step_inputs = [n for n in self._inputs if n not in {*constants, *pairs, *session_inputs}]
        outputs = [n for n in self._outputs if n not in pairs.values()]
        if self._hints.outputs:
            outputs = list(self._hints.outputs)
        self._close_axes(pairs)
        batch_axes, shapes = self._batch_axes(constants, pairs, [*step_inputs, *session_inputs])
        spec = model_pb2.ModelSpec(
            name=name,
            inputs=[self._spec_of(self._inputs[n], batch_axes, shapes) for n in step_inputs],
            outputs=[self._spec_of(self._outputs[n], batch_axes, shapes) for n in outputs],
            states=[self._state(n, pairs.get(n, ""), batch_axes, shapes) for n in [*pairs, *session_inputs]],
            constants=[
                model_pb2.ConstantSpec(name=n, value=to_message(value)) for n, value in constants.items()
            ],
        )
        if not pairs:
            self._missing.append(
                "no state was found: name each input and the output that is its next value, --state INPUT=OUTPUT"
            )
        if not step_inputs:
            self._missing.append(
                "no input of a step is left: say which input is one, --input NAME, and which are states, --state"
            )
        if not outputs:
            self._missing.append("no output is left that a caller would get: name one, --output NAME")
        kinds = dict.fromkeys(step_inputs, "input of a step") | dict.fromkeys(constants, "constant")
        kinds |= dict.fromkeys(session_inputs, "input of a session")
        kinds |= {n: f"state, its next value is {output}" for n, output in pairs.items()}
        given = dict.fromkeys(outputs, "output of a step")
        given |= {output: f"next value of {n}" for n, output in pairs.items()}
        rows = [("input", n, _said(t), kinds.get(n, "?")) for n, t in self._inputs.items()]
        rows += [("output", n, _said(t), given.get(n, "dropped")) for n, t in self._outputs.items()]
        return Draft(spec, rows, self._sure, self._guessed, self._missing)

    def _check_hints(self) -> None:
        hints = self._hints
        problems = [
            f"--{flag}: the graph has no {kind} {name!r}; it has {', '.join(there)}"
            for flag, kind, names, there in (
                ("axis", "input", hints.axes, self._inputs),
                ("state", "input", hints.states, self._inputs),
                ("state", "output", hints.states.values(), self._outputs),
                ("constant", "input", hints.constants, self._inputs),
                ("initial", "input", hints.initial, self._inputs),
                ("input", "input", hints.inputs, self._inputs),
                ("output", "output", hints.outputs, self._outputs),
            )
            for name in names
            if name not in there
        ]
        for name, lengths in hints.axes.items():
            for axis, length in lengths.items():
                shape = self._lengths.get(name, [])
                if axis == -1:
                    names = self._inputs[name].axis_names if name in self._inputs else ()
                    opened = [
                        a for a, n in enumerate(shape) if n is None and not _BATCH_NAMES.match(names[a])
                    ]
                    axis = opened[-1] if opened else -1
                if name not in self._inputs:
                    continue
                if not 0 <= axis < len(shape) or length < 1:
                    problems.append(f"--axis: input {name!r} has no such open axis that can be {length} long")
                elif shape[axis] not in (None, length):
                    problems.append(f"--axis: the graph fixes axis {axis} of {name!r} to {shape[axis]}")
                else:
                    shape[axis] = length
        if problems:
            raise ModelFileError(str(self._path), problems)

    def _constants(self) -> dict[str, Array]:
        constants: dict[str, Array] = {}
        for name, text in self._hints.constants.items():
            tensor = self._inputs[name]
            try:
                value = np.array(text.split(","), np.float64 if tensor.dtype.kind == "f" else np.int64)
            except ValueError as error:
                raise ModelFileError(str(self._path), [f"--constant {name}={text}: {error}"]) from error
            rank = len(tensor.shape or ())
            value = (
                value.reshape(())
                if rank == 0 and value.size == 1
                else value.reshape((1,) * (rank - 1) + (-1,))
            )
            constants[name] = value.astype(tensor.dtype)
        for name, tensor in self._inputs.items():
            told = {*constants, *self._hints.states, *self._hints.inputs}
            if name not in told and tensor.shape in ((), (1,)) and tensor.dtype.kind == "i":
                paired = any(_stem(name) == _stem(output) for output in self._outputs)
                if not paired:
                    self._missing.append(
                        f"input {name!r} is one integer: say what it is always, --constant {name}=VALUE, "
                        f"or that it comes with every step, --input {name}"
                    )
                    constants[name] = np.zeros(tensor.shape, tensor.dtype)
        return constants

    def _pairs(self, names: Sequence[str]) -> dict[str, str]:
        """States and their next values: as told, by names, by shapes that fit once, by order."""
        pairs = dict(self._hints.states)
        self._sure += [f"state {name!r} goes on as {output!r}: told" for name, output in pairs.items()]
        left = [n for n in names if n not in pairs and n not in self._hints.inputs]
        given = [n for n in self._outputs if n not in pairs.values() and n not in self._hints.outputs]
        for name in left:
            alike = [o for o in given if _stem(o) == _stem(name) and self._fit(name, o)]
            if len(alike) == 1:
                pairs[name] = alike[0]
                given.remove(alike[0])
                self._sure.append(f"state {name!r} goes on as {alike[0]!r}: by their names and shapes")
        if pairs:
            return self._without_the_steps(pairs, names)
        # What a step takes and gives comes first in nearly every export, so the last are the likeliest states.
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in left:
            groups.setdefault(tuple(o for o in given if self._fit(name, o)), []).append(name)
        for fitting, inputs in groups.items():
            fitting = tuple(o for o in fitting if o not in pairs.values())
            if not fitting:
                continue
            size = min(len(inputs), len(fitting))
            if size == len(given) and not self._hints.outputs:
                fitting = fitting[1:]
                size = min(size, len(fitting))
            for name, output in zip(
                inputs[len(inputs) - size :], fitting[len(fitting) - size :], strict=True
            ):
                pairs[name] = output
                how = "the only ones of their shape" if len(inputs) == len(fitting) == 1 else "by their order"
                self._guessed.append(f"state {name!r} goes on as {output!r}: {how}")
        return self._without_the_steps(pairs, names)

    def _without_the_steps(self, pairs: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
        """Pairs in the graph's order. Some input has to be the step's: the first, if all were taken for states."""
        left = [name for name in names if name not in self._hints.inputs]
        has_step_input = len(pairs) < len(left) or "step" in self._hints.inputs.values()
        if left and not has_step_input and (first := left[0]) not in self._hints.states:
            said = f"state {first!r} goes on as"
            self._sure = [line for line in self._sure if not line.startswith(said)]
            self._guessed = [line for line in self._guessed if not line.startswith(said)]
            self._guessed.append(
                f"input {first!r} is a step's and {pairs[first]!r} an output: some have to be, and the first mostly are"
            )
            left = left[1:]
        return {name: pairs[name] for name in left if name in pairs}

    def _fit(self, name: str, output: str) -> bool:
        taken, given = self._inputs[name], self._outputs[output]
        if taken.dtype != given.dtype or taken.shape is None:
            return False
        if given.shape is None:
            return True
        return len(taken.shape) == len(given.shape) and all(
            self._axes_fit(taken, given, axis) for axis in range(len(taken.shape))
        )

    @staticmethod
    def _axes_fit(taken: Tensor, given: Tensor, axis: int) -> bool:
        assert taken.shape is not None
        assert given.shape is not None
        for one, other in ((taken, given), (given, taken)):
            length = other.shape[axis]  # type: ignore[index]
            if _BATCH_NAMES.match(one.axis_names[axis]) and length not in (None, 1):
                return False
        return None in (taken.shape[axis], given.shape[axis]) or taken.shape[axis] == given.shape[axis]

    def _close_axes(self, pairs: Mapping[str, str]) -> None:
        """Lengths that the next value of a state fixes hold for the state."""
        for name, output in pairs.items():
            shape = self._outputs[output].shape
            for axis, length in enumerate(shape or ()):
                if self._lengths[name][axis] is None and length is not None and len(self._open(name)) > 1:
                    self._lengths[name][axis] = length

    def _open(self, name: str) -> list[int]:
        return [axis for axis, length in enumerate(self._lengths[name]) if length is None]

    def _candidates(self, name: str) -> list[int]:
        """Where the batch axis of an input may stand, the likeliest first; -1: nowhere."""
        lengths, names = self._lengths[name], self._inputs[name].axis_names
        open_axes = self._open(name)
        named = [axis for axis in open_axes if _BATCH_NAMES.match(names[axis])]
        if named:
            return named[:1]
        if open_axes:
            return open_axes
        ones = [axis for axis, length in enumerate(lengths) if length == 1]
        # [layers, batch, hidden] is the commonest shape of a state.
        ones.sort(key=lambda axis: axis != 1 if len(lengths) == 3 and len(ones) > 1 else axis)
        return [*ones, -1]

    def _batch_axes(
        self, constants: Mapping[str, Array], pairs: Mapping[str, str], others: Sequence[str]
    ) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
        """The batch axis of every tensor, and its shape for a batch of 1, by runs."""
        names = [*pairs, *others]
        options = [self._candidates(name) for name in names]
        for name, axes in zip(names, options, strict=True):
            self._tell_open_axes(name, axes)
        session = self._session(self._model)
        shapes: dict[str, tuple[int, ...]] = {}
        first = {name: axes[0] for name, axes in zip(names, options, strict=True)}
        feeds_of_one = {name: self._shape(name, axis, 1) for name, axis in first.items()}
        try:
            shapes = self._run(session, feeds_of_one, constants)
        except Exception as error:  # ONNX Runtime raises types of its own for what a model does
            if not self._missing:
                problem = str(error).split("\n", 1)[0]
                self._missing.append(
                    f"a run of zeros fails, so lengths are missing or wrong (--axis): {problem}"
                )
        shapes |= feeds_of_one
        for name, output in pairs.items():
            if shapes.get(output, shapes[name]) != shapes[name]:
                self._missing.append(
                    f"state {name!r} is growing, or {output!r} is not its next value: {list(shapes[name])} goes in, "
                    f"{list(shapes[output])} comes out"
                )
        freed = self._session(_freed(self._model, first))
        for choice in [] if self._hints.row_by_row else list(product(*options))[:_MOST_TRIALS]:
            if -1 in choice:
                continue
            chosen = dict(zip(names, choice, strict=True))
            found = self._trial(freed, chosen, constants, pairs, shapes)
            if found is not None:
                self._sure.append("rows of a batch do not depend on each other: by a run of 1 and of 2 rows")
                self._guessed += [
                    f"axis {axis} of {name!r} ({self._inputs[name].axis_names[axis]}) is the batch axis"
                    for name, axis in chosen.items()
                    if self._is_of_doubtful_name(name, axis)
                ]
                return chosen | found, shapes
        self._missing += [
            f"axis {axis} of {name!r} ({self._inputs[name].axis_names[axis]}) is open, and no batch axis by a run of "
            f"2 rows: say how long it is in a step, --axis {name}.{axis}=LENGTH"
            for name in names
            for axis in self._open(name)
            if len(self._open(name)) == 1 and self._is_of_doubtful_name(name, axis)
        ]
        if self._hints.row_by_row:
            self._sure.append("rows are run one after another: told")
        elif not self._missing:
            self._guessed.append(
                "the graph takes one session at a time: no run of 2 rows gave what each gives alone"
            )
        # One after another any axis of length 1 will do, and leaving it in the shape is the plainest.
        alone = {name: axis if self._open(name) else -1 for name, axis in first.items()}
        return alone | dict.fromkeys(self._outputs, -1), shapes

    def _trial(
        self,
        session: ort.InferenceSession | None,
        axes: Mapping[str, int],
        constants: Mapping[str, Array],
        pairs: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, int] | None:
        """The batch axes of the outputs, if a batch of 2 gives what its rows give alone."""
        if session is None:
            return None
        generator = np.random.default_rng(0)
        two = {name: self._random(generator, name, self._shape(name, axis, 2)) for name, axis in axes.items()}
        try:
            together = self._values(session, two, constants)
            alone = [
                self._values(
                    session, {name: np.take(v, [row], axes[name]) for name, v in two.items()}, constants
                )
                for row in range(2)
            ]
        except Exception:  # as above
            return None
        found: dict[str, int] = {}
        state_of = {output: name for name, output in pairs.items()}
        for name, values in together.items():
            row_shape = alone[0][name].shape
            if len(row_shape) != values.ndim:
                return None
            grown = [axis for axis in range(values.ndim) if (row_shape[axis], values.shape[axis]) == (1, 2)]
            if name in state_of and axes[state_of[name]] not in grown:
                return None
            if not grown:
                return None
            found[name] = axes[state_of[name]] if name in state_of else grown[0]
            for row in range(2):
                mine = np.take(values, [row], found[name])
                if mine.shape != row_shape or not np.allclose(
                    mine, alone[row][name], 1e-4, 1e-5, equal_nan=True
                ):
                    return None
        return found

    def _tell_open_axes(self, name: str, candidates: Sequence[int]) -> None:
        open_axes = self._open(name)
        if len(open_axes) > 1:
            for axis in open_axes:
                if axis != candidates[0]:
                    self._missing.append(
                        f"axis {axis} of {name!r} is open: say how long it is, --axis {name}.{axis}=LENGTH"
                    )

    def _is_of_doubtful_name(self, name: str, axis: int) -> bool:
        """Whether an axis that is open has a name, and not one of those that batch axes have."""
        return axis in self._open(name) and not _BATCH_NAMES.match(
            self._inputs[name].axis_names[axis] or "batch"
        )

    def _shape(self, name: str, batch_axis: int, batch_size: int) -> tuple[int, ...]:
        return tuple(
            batch_size if axis == batch_axis else (1 if length is None else length)
            for axis, length in enumerate(self._lengths[name])
        )

    def _random(self, generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
        dtype = self._inputs[name].dtype
        values = generator.uniform(-1, 1, shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
        return np.asarray(values).astype(dtype)

    def _session(self, model: onnx.ModelProto) -> ort.InferenceSession | None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            return ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # as above
            if model is self._model:
                problem = f"ONNX Runtime cannot load it: {error}".split("\n", 1)[0]
                raise ModelFileError(str(self._path), [problem]) from error
            return None

    def _run(
        self,
        session: ort.InferenceSession | None,
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, Array],
    ) -> dict[str, tuple[int, ...]]:
        assert session is not None
        feeds = {name: np.zeros(shape, self._inputs[name].dtype) for name, shape in shapes.items()}
        return {name: value.shape for name, value in self._values(session, feeds, constants).items()}

    def _values(
        self, session: ort.InferenceSession, feeds: Mapping[str, Array], constants: Mapping[str, Array]
    ) -> dict[str, Array]:
        names = list(self._outputs)
        values = session.run(names, {**feeds, **constants})
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def _spec_of(
        self, tensor: Tensor, batch_axes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> model_pb2.TensorSpec:
        axis = batch_axes.get(tensor.name, -1)
        shape = list(shapes.get(tensor.name) or [length or 1 for length in tensor.shape or ()])
        if axis >= 0:
            del shape[axis]
        return model_pb2.TensorSpec(
            name=tensor.name, dtype=data_type(tensor.dtype), shape=shape, batch_axis=axis
        )

    def _state(
        self,
        name: str,
        output: str,
        batch_axes: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> model_pb2.StateSpec:
        tensor = self._spec_of(self._inputs[name], batch_axes, shapes)
        state = model_pb2.StateSpec(
            input_name=name,
            output_name=output,
            role=model_pb2.STATE_ROLE_OTHER,
            dtype=tensor.dtype,
            shape=tensor.shape,
            batch_axis=tensor.batch_axis,
        )
        text = self._hints.initial.get(name)
        if text is None:
            if output:
                state.fill = 0
                self._guessed.append(f"state {name!r} begins from zeros; else --initial {name}=VALUE")
        elif isinstance(text, np.ndarray) or text.endswith(".npy"):
            loaded = text if isinstance(text, np.ndarray) else np.load(text)
            values = loaded.astype(numpy_dtype(tensor.dtype))
            state.values.CopyFrom(to_message(values.reshape(tuple(tensor.shape))))
        else:
            try:
                state.fill = {"zeros": 0.0, "ones": 1.0}[text] if text in ("zeros", "ones") else float(text)
            except ValueError:
                raise ModelFileError(
                    str(self._path), [f"--initial {name}={text}: say zeros, ones, a number or a .npy file"]
                ) from None
        return state


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except Exception as error:  # onnx, protobuf and the file system each have their own
        raise ModelFileError(str(path), [f"it is not a valid ONNX file: {error}"]) from error
    if not is_text(model):
        raise ModelFileError(str(path), [NOT_TEXT])
    return model


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    tensor_type = value.type.tensor_type
    try:
        dtype = numpy_dtype(data_type(helper.tensor_dtype_to_np_dtype(tensor_type.elem_type)))
    except (TensorError, KeyError):
        raise TensorError("dtype", f"{value.name!r} is of a type that cannot be served") from None
    if not tensor_type.HasField("shape"):
        return Tensor(value.name, dtype, None, ())
    axes = tensor_type.shape.dim
    return Tensor(
        value.name,
        dtype,
        tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in axes),
        tuple(axis.dim_param for axis in axes),
    )


def _freed(model: onnx.ModelProto, batch_axes: Mapping[str, int]) -> onnx.ModelProto:
    """The model without the shapes that it declares, which may hold for a batch of 1 alone."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    del freed.graph.value_info[:]
    for value in freed.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_value == 1:
                axis.Clear()
    for value in freed.graph.output:
        value.type.tensor_type.ClearField("shape")
    return freed


def _stem(name: str) -> str:
    """A name without what tells a state from its next value."""
    stem = name
    for pattern in (_PREFIX, _SUFFIX, _GLUED):
        stem = pattern.sub("", stem)
    return re.sub(r"[^a-z0-9]+", "", stem.lower()) or name.lower()


def _said(tensor: Tensor) -> str:
    if tensor.shape is None:
        return f"{tensor.dtype} of any shape"
    axes = [
        str(n) if n is not None else (p or "?") for n, p in zip(tensor.shape, tensor.axis_names, strict=True)
    ]
    return f"{tensor.dtype} [{', '.join(axes)}]"
