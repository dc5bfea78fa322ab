"""Verification: does the written file do what the module does, and for every batch the same?

Only the file is trusted: the initial state is read from its metadata, and ONNX Runtime runs its graph. The module
runs beside it in torch, in double precision, so that what is measured is the file's own error. A cell of a run is fed
sequences of the task that it was trained on: on noise a trained cell can be chaotic, and two correct
implementations that differ in the last bit end up far apart.

Shapes: T steps, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch

from export.errors import VerificationError
from export.onnx_file import read_spec
from export.spec import initial_value
from export.step import INPUT, Step
from ntm.tensor import Array
from ntm.v1 import model_pb2
from training.tasks import Size, Task

BATCH_SIZES = (1, 2, 7, 64)
# In units of the tensor's largest element where that is above 1: a trained LSTM sums terms of up to 90 to a gate
# near 0, and torch's own float32 is up to 2e-5 away from its float64.
LARGEST_DIFFERENCE = 1e-5
# A machine that looks things up in a full memory magnifies rounding: associative recall with 20 items is 4e-5 away
# after 88 steps, priority sort with its ten heads 3e-3 after 36. So each step is held to the cell's by itself, and
# where steps follow one another the file may be a few times as inexact as torch in the same precision, within reason.
_TIMES_TORCH = 4
_MOST_IN_A_STEP = 1e-4
_MOST = 1e-2
LARGEST_INVARIANT_BATCH = 128
_INVARIANCE_STEPS = 21

Tensors = dict[str, Array]


class Difference(NamedTuple):
    """How far from the module in double precision something was at most, in any row and step."""

    output: float
    state: float


class Report(NamedTuple):
    """What was verified, and how well it holds."""

    num_nodes: int
    num_bytes: int
    num_steps: int
    """Steps for which both ran side by side."""
    differences: dict[int, Difference]
    """By batch size."""
    invariance: str = ""
    """What depends on a row's company in its batch; empty if nothing does."""
    hard_wired: str = ""
    """Why the graph takes a batch of 1 and no other, so that servers run rows one by one; empty if it takes any."""


def verify(path: Path, step: Step, sequences: Tensors, *, is_invariance_required: bool = True) -> Report:
    """Verify a written file against the module it came from, on sequences of inputs.

    Args:
        path: of the file.
        step: of the module.
        sequences: [T, ...] for each input by its name, every step a batch of `LARGEST_INVARIANT_BATCH`.
        is_invariance_required: a row whose bits depend on its batch is an error; else it is only told.

    Raises:
        VerificationError: the file is not valid ONNX, differs from the module, or treats batches differently.
    """
    model = onnx.load(path)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the file is not valid ONNX: {error}") from None
    runner = _File(path, read_spec(model), step)
    for name, tensor in step.initial_state(1).items():
        expected = tensor.select(step.batch_axes[name], 0).numpy()
        if not np.array_equal(runner.initial[name], expected, equal_nan=expected.dtype.kind == "f"):
            raise VerificationError(f"the initial value of {name} in the metadata is not the cell's")
    exact = _exact(step)
    num_steps = len(next(iter(sequences.values())))
    differences = {}
    for size in (1,) if step.hard_wired else BATCH_SIZES:
        rows = {
            name: step_rows(step, name, array, slice(-size, None), 1) for name, array in sequences.items()
        }
        alone = _differences(runner, step, exact, rows, is_closed_loop=False)
        together = _differences(runner, step, exact, rows, is_closed_loop=True)
        _check(*alone, _MOST_IN_A_STEP, f"at batch {size}, in one step")
        _check(*together, _MOST, f"at batch {size}, within {num_steps} steps")
        differences[size] = together[0]
    if step.hard_wired:
        return Report(
            len(model.graph.node),
            path.stat().st_size,
            num_steps,
            differences,
            hard_wired=step.hard_wired,
        )
    few = {name: array[:_INVARIANCE_STEPS] for name, array in sequences.items()}
    # Where it must hold every size is tried, else some.
    sizes = range(1, LARGEST_INVARIANT_BATCH + 1) if is_invariance_required else BATCH_SIZES
    problem = _variance(runner, few, sizes)
    if problem and is_invariance_required:
        raise VerificationError(f"{problem}; memory_rows that are a multiple of 4 avoid it")
    return Report(len(model.graph.node), path.stat().st_size, num_steps, differences, problem)


def task_sequences(task: Task, long_sizes: list[Size]) -> Tensors:
    """Another sequence of the task in each row, as long as the longest the model was trained or judged on."""
    drawn = [
        task.draw(LARGEST_INVARIANT_BATCH, size, torch.Generator().manual_seed(0)).inputs
        for size in (max(task.sizes()), *long_sizes)
    ]
    return {INPUT: max(drawn, key=len).numpy()}


def random_sequences(step: Step, num_steps: int) -> Tensors:
    """For inputs of which nothing is known: numbers around the example, drawn from a normal distribution of deviation
    1; integers and truth values as in the example."""
    random = np.random.default_rng(0)
    sequences = {}
    for name, tensor in step.example_inputs(LARGEST_INVARIANT_BATCH).items():
        array = np.repeat(tensor.numpy()[None], num_steps, axis=0)
        if array.dtype.kind == "f":
            array = (array + random.standard_normal(array.shape)).astype(array.dtype)
        sequences[name] = array
    return sequences


@torch.no_grad()
def follow(path: Path, step: Step, sequences: Tensors) -> float:
    """How far a file's outputs are at most from a step's in torch, each feeding back its own state.

    Args:
        path: of the file.
        step: of the module.
        sequences: [T, ...] for each input by its name.
    """
    runner = _File(path, read_spec(onnx.load(path)), step)
    name, first = next(iter(sequences.items()))
    size = first.shape[1 + step.batch_axes[name]]
    theirs, ours = runner.start(size), _State(step.initial_state(size))
    apart = []
    for inputs in _steps(sequences):
        outputs, theirs = runner.run(inputs, theirs)
        expected = ours.advance(step, inputs)
        apart += [_apart(outputs[name], tensor) for name, tensor in expected.items()]
    return float(np.max(apart))


def step_rows(step: Step, name: str, array: Array, rows: slice, num_leading: int = 0) -> Array:
    """Some rows of a batch, of the input, output or state of that name, which may have leading axes."""
    part: Array = array[(slice(None),) * (step.batch_axes[name] + num_leading) + (rows,)]
    return part


class _File:
    """A file that is run by the names that its own spec gives, as the server does it."""

    def __init__(self, path: Path, spec: model_pb2.ModelSpec, step: Step) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in spec.outputs]
        self._carried = {state.output_name: state.input_name for state in spec.states if state.output_name}
        self._axes = {state.input_name: state.batch_axis for state in spec.states}
        self.initial = {state.input_name: initial_value(state) for state in spec.states}
        self.step = step

    def start(self, batch_size: int) -> Tensors:
        """What a session starts from, in every row."""
        return {
            name: np.repeat(np.expand_dims(value, self._axes[name]), batch_size, axis=self._axes[name])
            for name, value in self.initial.items()
        }

    def run(self, inputs: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """One step, to the outputs and the next state."""
        found = self._session.run([*self._outputs, *self._carried], inputs | state)
        outputs = dict(zip(self._outputs, found, strict=False))
        after = dict(zip(self._carried.values(), found[len(outputs) :], strict=True))
        return outputs, state | after


class _State:
    """The state of a step in torch, as it goes on."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def advance(self, step: Step, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Take a step; returns its outputs."""
        given = [_like(torch.from_numpy(inputs[name]), step.inputs[name]) for name in step.inputs]
        found = step(*given, *(self.tensors[name] for name in step.states))
        outputs = dict(zip(step.outputs, found, strict=False))
        self.tensors = self.tensors | dict(zip(step.carried_names, found[len(outputs) :], strict=True))
        return outputs

    def rounded(self, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the precision of other tensors."""
        return {name: _like(tensor, like[name]) for name, tensor in self.tensors.items()}


def _like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return tensor.to(other.dtype)


def _steps(sequences: Tensors) -> Iterator[Tensors]:
    for t in range(len(next(iter(sequences.values())))):
        yield {name: np.ascontiguousarray(array[t]) for name, array in sequences.items()}


@torch.no_grad()
def _exact(step: Step) -> Step:
    """The step in double precision; as it is where its module makes float32 of its own."""
    exact = step.in_double_precision()
    try:
        exact(*exact.example_inputs(1).values(), *exact.initial_state(1).values())
    except RuntimeError:
        return step
    return exact


def _check(of_file: Difference, of_torch: Difference, most: float, where: str) -> None:
    for what, difference, reference in zip(("outputs", "states"), of_file, of_torch, strict=True):
        allowed = min(max(LARGEST_DIFFERENCE, _TIMES_TORCH * reference), most)
        if not difference <= allowed:  # Also when it is not a number.
            raise VerificationError(
                f"the {what} {where}, differ between ONNX Runtime and torch by {difference:.2g}; "
                f"{allowed:.2g} is allowed. A cell that was hardly trained can be chaotic, so "
                "that rounding errors grow: train it further"
            )


@torch.no_grad()
def _differences(
    runner: _File, single: Step, exact: Step, sequences: Tensors, is_closed_loop: bool
) -> tuple[Difference, Difference]:
    """How far the file, and torch in its precision, are from the exact module.

    In closed loop each feeds its own state back, so that errors may grow; else all take every step from the exact
    module's state, rounded.
    """
    name, first = next(iter(sequences.items()))
    batch_size = first.shape[1 + single.batch_axes[name]]
    theirs = runner.start(batch_size)
    ours, best = _State(single.initial_state(batch_size)), _State(exact.initial_state(batch_size))
    of_file, of_torch = _Apart(), _Apart()
    of_file.states += [_apart(theirs[name], tensor) for name, tensor in best.tensors.items()]
    for inputs in _steps(sequences):
        if not is_closed_loop:
            ours.tensors = best.rounded(single.states)
            best.tensors = {name: _like(tensor, exact.states[name]) for name, tensor in ours.tensors.items()}
            theirs = {name: tensor.numpy() for name, tensor in ours.tensors.items()}
        their_outputs, theirs = runner.run(inputs, theirs)
        our_outputs, best_outputs = ours.advance(single, inputs), best.advance(exact, inputs)
        for name, tensor in best_outputs.items():
            of_file.outputs.append(_apart(their_outputs[name], tensor))
            of_torch.outputs.append(_apart(our_outputs[name].numpy(), tensor))
        for name, tensor in best.tensors.items():
            of_file.states.append(_apart(theirs[name], tensor))
            of_torch.states.append(_apart(ours.tensors[name].numpy(), tensor))
    return of_file.greatest(), of_torch.greatest()


class _Apart:
    """Differences, step by step."""

    def __init__(self) -> None:
        self.outputs: list[float] = []
        self.states: list[float] = []

    def greatest(self) -> Difference:
        # np.max keeps NaN, max does not. A step has a state, but torch's start needs no check.
        return Difference(float(np.max(self.outputs)), float(np.max(self.states)))


def _apart(their: Array, our: torch.Tensor) -> float:
    """The greatest difference between two tensors, in units of the largest element or of 1; NaN if one has NaN."""
    their_array, our_array = their.astype(np.float64), our.double().numpy()
    return float(np.max(np.abs(their_array - our_array)) / np.maximum(1, np.max(np.abs(our_array))))


def _variance(runner: _File, sequences: Tensors, sizes: Sequence[int]) -> str:
    """Which rows have other bits in a batch of another size or at another place in it; empty if none.

    Every size is tried at every step, each time with other rows.
    """
    step, whole_size = runner.step, LARGEST_INVARIANT_BATCH
    num_steps = len(next(iter(sequences.values())))
    state = runner.start(whole_size)
    for at, inputs in enumerate(_steps(sequences)):
        outputs, next_state = runner.run(inputs, state)
        for size in sizes:
            first = at * (whole_size - size) // max(1, num_steps - 1)
            rows = slice(first, first + size)
            part_outputs, part = runner.run(
                {name: step_rows(step, name, array, rows) for name, array in inputs.items()},
                {name: step_rows(step, name, array, rows) for name, array in state.items()},
            )
            differing = [
                name
                for name, array in (part_outputs | part).items()
                if array.tobytes() != step_rows(step, name, (outputs | next_state)[name], rows).tobytes()
            ]
            if differing:
                return (
                    f"at batch {size}, rows {first} to {first + size - 1} of {', '.join(differing)} have other "
                    f"bits than in a batch of {whole_size}"
                )
        state = next_state
    return ""
