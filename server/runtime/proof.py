"""Proof: what the server makes of a model is what a plain loop of ONNX Runtime makes of it.

The loop runs the file as it is, one session at a time. The runner's steps are held against it for a few sessions, and
its batches against sessions alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntm.tensor import Array, to_array
from server.errors import ModelFileError
from server.model.layout import Steps
from server.model.spec import StepModel, graph_shape, initial_value
from server.runtime.probe import beginnings, random_steps
from server.runtime.provider import Device
from server.runtime.runner import ModelRunner

_NUM_STEPS = 50
_NUM_LOOPS = 2
_BATCH_SIZES = (1, 2, 3, 7, 8, 16, 33, 64)
_LEAST_CLOSE = 1e-6
_PIECE_STEPS = 8


@dataclass(frozen=True)
class Proof:
    """What was found."""

    num_steps: int
    batch_sizes: list[int]
    largest_difference: float
    """From the plain loop, relative to its largest value; 0: bit for bit."""


def prove(runner: ModelRunner, num_steps: int = _NUM_STEPS) -> Proof:
    """Hold steps of random inputs against a plain loop, and batches against sessions alone.

    Args:
        runner: as the server would run the model; its slots are overwritten.
        num_steps: how many steps of each session.

    Raises:
        ModelFileError: something differs.
    """
    sizes = [size for size in _BATCH_SIZES if size <= min(runner.num_slots, runner.max_batch_size)]
    slots, inputs = random_steps(runner, sizes[-1], num_steps)
    states = beginnings(runner, len(slots))
    runner.write(slots, states)
    alone = np.concatenate(
        [_run(runner, slots[row : row + 1], inputs[:, row : row + 1]) for row in range(len(slots))], 1
    )
    for size in sizes:
        together = _run(runner, slots[:size], np.ascontiguousarray(inputs[:, :size]))
        if together.tobytes() != np.ascontiguousarray(alone[:, :size]).tobytes():
            raise ModelFileError(
                runner.model.label, [f"a batch of {size} gives other bits than its sessions do alone"]
            )
    difference = 0.0
    for row in range(min(_NUM_LOOPS, len(slots))):
        expected = plain_loop(
            runner.model, runner.device, inputs[:, row], {name: state[row] for name, state in states.items()}
        )
        for name, values in expected.items():
            served = runner.model.outputs.tensor(alone[:, row], name)
            difference = max(difference, _difference(served, values))
    if difference > _LEAST_CLOSE:
        raise ModelFileError(
            runner.model.label,
            [f"steps differ from those of a plain loop of ONNX Runtime by {difference:.1e}"],
        )
    return Proof(num_steps, sizes, difference)


def plain_loop(
    model: StepModel, device: Device, inputs: Steps, states: dict[str, Array] | None = None
) -> dict[str, Array]:
    """Steps [T] of one session, by the file as it is: outputs [T, ...output shape] by name."""
    session = device.session(model.step.SerializeToString())
    feeds = {constant.name: to_array(constant.value) for constant in model.spec.constants}
    for state in model.spec.states:
        value = initial_value(state) if states is None else states[state.input_name]
        feeds[state.input_name] = np.array(value).reshape(graph_shape(state))
    outputs: dict[str, list[Array]] = {tensor.name: [] for tensor in model.spec.outputs}
    carried = {state.output_name: state.input_name for state in model.spec.states if state.output_name}
    names = list(dict.fromkeys([*outputs, *carried]))
    for step in range(len(inputs)):
        for tensor in model.spec.inputs:
            # A copy: sums can depend on where in memory what they sum up begins.
            value = model.inputs.tensor(inputs[step : step + 1], tensor.name).copy()
            feeds[tensor.name] = value.reshape(graph_shape(tensor))
        given = dict(zip(names, session.run(names, feeds), strict=True))
        for tensor in model.spec.outputs:
            outputs[tensor.name].append(np.asarray(given[tensor.name]).reshape(tuple(tensor.shape)))
        feeds |= {name: np.asarray(given[output]) for output, name in carried.items()}
    return {name: np.stack(values) for name, values in outputs.items()}


def _run(runner: ModelRunner, slots: Array, inputs: Steps) -> Steps:
    """Steps [T, B] of the sessions in some slots [B]; the slots stay as they are."""
    runner.move(slots, runner.first_batch_row(0) + np.arange(len(slots)))
    size = _PIECE_STEPS if runner.can_scan else 1
    pieces = [np.ascontiguousarray(inputs[start : start + size]) for start in range(0, len(inputs), size)]
    return np.concatenate([runner.run(piece).copy() for piece in pieces])


def _difference(some: Array, others: Array) -> float:
    if np.array_equal(some, others, equal_nan=some.dtype.kind == "f"):
        return 0.0
    scale = max(1.0, float(np.abs(others).max(initial=0)))
    return float(np.abs(some.astype(np.float64) - others.astype(np.float64)).max()) / scale
