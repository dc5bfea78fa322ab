"""Verification: does the written file do what the cell does, and for every batch the same?

Only the file is trusted: the initial state is read from its metadata, and ONNX Runtime runs its graph. The cell
runs beside it in torch, in double precision, so that what is measured is the file's own error. Both are fed
sequences of the task the cell was trained on: on noise a trained cell can be chaotic, and two correct
implementations that differ in the last bit end up far apart.

Shapes: T steps, B batch.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch

from export.errors import VerificationError
from export.onnx_file import read_spec
from export.spec import initial_value
from export.step import Step
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
    """How far from the cell in double precision something was at most, in any row and step."""

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


def verify(path: Path, step: Step, task: Task, long_sizes: list[Size]) -> Report:
    """Verify a written file against the cell it came from, on sequences of its task as long as any it was judged on.

    Raises:
        VerificationError: the file is not valid ONNX, differs from the cell, or treats batches differently.
    """
    model = onnx.load(path)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the file is not valid ONNX: {error}") from None
    spec = read_spec(model)
    initial = {state.input_name: initial_value(state) for state in spec.states}
    for name, tensor in step.initial_state(1).items():
        if not np.array_equal(initial[name], tensor[0].numpy()):
            raise VerificationError(f"the initial value of {name} in the metadata is not the cell's")
    session = _session(path)
    exact = Step(copy.deepcopy(step.cell).double(), step.loss)
    inputs = _inputs(task, long_sizes)
    differences = {}
    for size in BATCH_SIZES:
        rows = inputs[:, -size:]
        alone = _differences(session, spec, step, exact, initial, rows, is_closed_loop=False)
        together = _differences(session, spec, step, exact, initial, rows, is_closed_loop=True)
        _check(*alone, _MOST_IN_A_STEP, f"at batch {size}, in one step")
        _check(*together, _MOST, f"at batch {size}, within {len(rows)} steps")
        differences[size] = together[0]
    _check_invariance(session, spec, initial, inputs[:_INVARIANCE_STEPS])
    return Report(len(model.graph.node), path.stat().st_size, len(inputs), differences)


@torch.no_grad()
def follow(path: Path, step: Step, inputs: Array) -> float:
    """How far a file's outputs are at most from a step's in torch, each feeding back its own state.

    Args:
        path: of the file.
        step: of the cell.
        inputs: [T, B, I].
    """
    spec, session = read_spec(onnx.load(path)), _session(path)
    initial = {state.input_name: initial_value(state) for state in spec.states}
    theirs, ours = _start(initial, inputs.shape[1]), list(step.initial_state(inputs.shape[1]).values())
    apart = []
    for step_inputs in inputs:
        output, theirs = _run(session, spec, step_inputs, theirs)
        expected, *ours = step(torch.from_numpy(step_inputs), *ours)
        apart.append(_apart(output, expected))
    return float(np.max(apart))


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(
    session: ort.InferenceSession, spec: model_pb2.ModelSpec, inputs: Array, state: Tensors
) -> tuple[Array, Tensors]:
    """One step by the names that the file's own spec gives, as the server does it."""
    names = [spec.outputs[0].name, *(state_spec.output_name for state_spec in spec.states)]
    output, *next_state = session.run(names, {spec.inputs[0].name: inputs, **state})
    return output, {
        state_spec.input_name: value for state_spec, value in zip(spec.states, next_state, strict=True)
    }


def _inputs(task: Task, long_sizes: list[Size]) -> Array:
    """[T, B, I], another sequence of the task in each row, as long as the longest it was trained or judged on."""
    drawn = [
        task.draw(LARGEST_INVARIANT_BATCH, size, torch.Generator().manual_seed(0)).inputs
        for size in (max(task.sizes()), *long_sizes)
    ]
    longest: Array = max(drawn, key=len).numpy()
    return longest


def _start(initial: Tensors, batch_size: int) -> Tensors:
    return {name: np.repeat(value[None], batch_size, axis=0) for name, value in initial.items()}


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
    session: ort.InferenceSession,
    spec: model_pb2.ModelSpec,
    single: Step,
    exact: Step,
    initial: Tensors,
    sequence: Array,
    is_closed_loop: bool,
) -> tuple[Difference, Difference]:
    """How far the file, and torch in its precision, are from the exact cell.

    In closed loop each feeds its own state back, so that errors may grow; else all take every step from the exact
    cell's state, rounded.
    """
    batch_size = sequence.shape[1]
    theirs = _start(initial, batch_size)
    ours, best = (
        list(single.initial_state(batch_size).values()),
        list(exact.initial_state(batch_size).values()),
    )
    of_file, of_torch = _Apart(), _Apart()
    of_file.states += [
        _apart(theirs[name], tensor) for name, tensor in zip(exact.state_names, best, strict=True)
    ]
    for inputs in sequence:
        if not is_closed_loop:
            ours = [tensor.float() for tensor in best]
            best = [tensor.double() for tensor in ours]
            theirs = {name: tensor.numpy() for name, tensor in zip(exact.state_names, ours, strict=True)}
        their_output, theirs = _run(session, spec, inputs, theirs)
        our_output, *ours = single(torch.from_numpy(inputs), *ours)
        best_output, *best = exact(torch.from_numpy(inputs).double(), *best)
        of_file.outputs.append(_apart(their_output, best_output))
        of_torch.outputs.append(_apart(our_output.numpy(), best_output))
        of_file.states += [
            _apart(theirs[name], tensor) for name, tensor in zip(exact.state_names, best, strict=True)
        ]
        of_torch.states += [_apart(our.numpy(), tensor) for our, tensor in zip(ours, best, strict=True)]
    return of_file.greatest(), of_torch.greatest()


class _Apart:
    """Differences, step by step."""

    def __init__(self) -> None:
        self.outputs: list[float] = []
        self.states: list[float] = []

    def greatest(self) -> Difference:
        # np.max keeps NaN, max does not. A cell has a state, but torch's start needs no check.
        return Difference(float(np.max(self.outputs)), float(np.max(self.states)))


def _apart(their: Array, our: torch.Tensor) -> float:
    """The greatest difference between two tensors, in units of the largest element or of 1; NaN if one has NaN."""
    our_array = our.numpy()
    return float(np.max(np.abs(their - our_array)) / np.maximum(1, np.max(np.abs(our_array))))


def _check_invariance(
    session: ort.InferenceSession, spec: model_pb2.ModelSpec, initial: Tensors, sequence: Array
) -> None:
    """A row has the same bits whatever the size of the batch and wherever in it the row stands.

    Every size is tried at every step, each time with other rows.
    """
    whole_size = LARGEST_INVARIANT_BATCH
    state = _start(initial, whole_size)
    for at, inputs in enumerate(sequence):
        output, next_state = _run(session, spec, inputs, state)
        for size in range(1, whole_size + 1):
            first = at * (whole_size - size) // max(1, len(sequence) - 1)
            rows = slice(first, first + size)
            part_output, part = _run(
                session, spec, inputs[rows], {name: value[rows] for name, value in state.items()}
            )
            differing = [name for name in part if part[name].tobytes() != next_state[name][rows].tobytes()]
            if part_output.tobytes() != output[rows].tobytes():
                differing.insert(0, spec.outputs[0].name)
            if differing:
                raise VerificationError(
                    f"at batch {size}, rows {first} to {first + size - 1} of {', '.join(differing)} have other "
                    f"bits than in a batch of {whole_size}; memory_rows that are a multiple of 4 avoid it"
                )
        state = next_state
