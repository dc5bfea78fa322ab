"""Probe: find out how a model's rows are best run, and what that costs, before it serves anybody.

What a batch gives must be what each of its sessions would get alone, bit for bit. So before a model is served, random
steps of it are run alone and in batches of many sizes:

- rows together, where that proves them independent, whether the graph's batch axis is open or only said to be 1;
- else rows together in batches that are always padded to one size, where the graph's own batch axes are open and
  padding makes rows independent;
- else one row after another, which is right by construction.

Shapes: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from time import perf_counter

import numpy as np
import structlog

from ntm.tensor import Array, numpy_dtype
from server.errors import ModelFileError
from server.model.layout import Steps
from server.model.spec import StepModel, initial_value, is_session_input
from server.runtime.graphs import TensorLike
from server.runtime.provider import Device
from server.runtime.runner import INITIAL_SLOT, NUM_RESERVED_SLOTS, ModelRunner, Rows

log = structlog.get_logger()

_NUM_TIMED_TURNS = 3


def load_runner(model: StepModel, device: Device, num_slots: int, max_batch_size: int) -> ModelRunner:
    """A runner that runs the model's rows in the way that measures best.

    Args:
        model: the model, checked.
        device: where to run it.
        num_slots: how many slots to have.
        max_batch_size: rows of one step at most.

    Raises:
        DeviceError: the device cannot be had.
        ModelFileError: ONNX Runtime cannot load the graph, or it gives other shapes than its spec says.
    """
    runner = _load_together(model, device, num_slots, max_batch_size)
    if runner is None:
        runner = ModelRunner(model, device, num_slots, max_batch_size, row_by_row=True)
        runner.is_batch_invariant = True
    runner.can_scan = gives_the_same_at_once(runner)
    runner.turn_times_s = measure_turns(runner)
    _warn_of_cost(runner)
    return runner


def _warn_of_cost(runner: ModelRunner) -> None:
    """Say in the log where batching brings little, and what it costs."""
    if runner.row_by_row:
        event = "the graph takes one session at a time, so the rows of a batch are run one after another"
        cost = "a batch takes about as long as its rows do alone"
    elif runner.padded_batch_size:
        event = "the step's results depend on the batch's size, so every batch is padded to the largest"
        cost = (
            "a single step costs as much as a full batch; `python -m export` writes steps that need no padding, and a "
            "smaller --max-batch-size pads less"
        )
    else:
        return
    log.warning(event, model=runner.model.label, rows=runner.rows_are_run, cost=cost, **runner.turn_times_ms)


def _load_together(
    model: StepModel, device: Device, num_slots: int, max_batch_size: int
) -> ModelRunner | None:
    """A runner of rows together, if that gives what rows alone do."""
    tensors: list[TensorLike] = [*model.spec.inputs, *model.spec.outputs, *model.spec.states]
    if any(tensor.batch_axis < 0 for tensor in tensors):
        return None
    try:
        runner = ModelRunner(model, device, num_slots, max_batch_size)
    except ModelFileError:
        return None  # something in the graph takes a batch axis to be 1, or the file cannot be served at all
    if is_free(runner, is_open=not any(_fixed_batch_axes(model))):
        return runner
    runner.close()
    return None


def _fixed_batch_axes(model: StepModel) -> Iterator[str]:
    """The graph's inputs whose batch axis is said to be 1."""
    values = {value.name: value.type.tensor_type.shape.dim for value in model.step.graph.input}
    for name, axis in [
        *((tensor.name, tensor.batch_axis) for tensor in model.spec.inputs),
        *((state.input_name, state.batch_axis) for state in model.spec.states),
    ]:
        if len(values[name]) > axis and values[name][axis].HasField("dim_value"):
            yield name


def is_free(runner: ModelRunner, is_open: bool) -> bool:
    """Measure whether rows run together give what they give alone; if not, pad every batch to one size, measure again.

    Args:
        runner: of rows together; it is told what was found.
        is_open: whether the graph's own batch axes are, so that padding may help.
    """
    largest = _largest(runner)
    try:
        differing = _differing_batch_size(runner, largest)
    except Exception as error:  # ONNX Runtime raises types of its own for what a model does
        if not _runs_alone(runner):
            # What random inputs fail on may well be sent by nobody; but what is not proven is not done.
            log.warning(
                "whether rows are independent could not be measured: the step fails on random inputs",
                model=runner.model.label,
                error=str(error).split("\n", 1)[0],
            )
        return False
    if differing is None:
        runner.is_batch_invariant = True
        return True
    if not is_open:
        return False
    runner.padded_batch_size = runner.max_batch_size
    if _differing_batch_size(runner, largest) is not None:
        return False
    runner.is_batch_invariant = True
    return True


def gives_the_same_at_once(runner: ModelRunner) -> bool:
    """Measure whether two steps at once give what one after the other does."""
    largest = _largest(runner)
    slots, inputs = random_steps(runner, largest)
    runner.can_scan = True
    try:
        one_by_one = _two_steps(runner, slots, inputs, largest)
        at_once = _two_steps(runner, slots, inputs, largest, at_once=True)
        if _are_equal(one_by_one, at_once):
            return True
        reason = "their results differ from those of one at a time"
    except Exception as error:  # as above
        reason = str(error).split("\n", 1)[0]
    log.warning(
        "several steps cannot be run at once, so each is run by itself",
        model=runner.model.label,
        reason=reason,
    )
    return False


def measure_turns(runner: ModelRunner) -> dict[int, float]:
    """How long a step takes: of one row, of half the largest batch and of all of it; empty if it fails."""
    times_s: dict[int, float] = {}
    for size in sorted({1, runner.max_batch_size // 2, runner.max_batch_size} - {0}):
        _, inputs = random_steps(runner, size)
        batch_rows = runner.first_batch_row(0) + np.arange(size)
        runner.move(np.full_like(batch_rows, INITIAL_SLOT), batch_rows)
        for _ in range(_NUM_TIMED_TURNS):
            start_s = perf_counter()
            try:
                runner.run(inputs[:1])
            except Exception:  # ONNX Runtime raises types of its own; `is_free` has told of it
                return {}
            time_s = perf_counter() - start_s
            times_s[size] = min(time_s, times_s.get(size, time_s))
    return times_s


def _runs_alone(runner: ModelRunner) -> bool:
    slots, inputs = random_steps(runner, 1)
    try:
        _two_steps(runner, slots, inputs, batch_size=1)
    except Exception:  # as above
        return False
    return True


def _largest(runner: ModelRunner) -> int:
    return min(runner.num_slots, runner.max_batch_size)


def _differing_batch_size(runner: ModelRunner, largest: int) -> int | None:
    """The first batch size at which some row's output or state differs from a batch of one, or None."""
    slots, inputs = random_steps(runner, largest)
    alone = _two_steps(runner, slots, inputs, batch_size=1)
    for batch_size in _probe_sizes(largest):
        if not _are_equal(alone, _two_steps(runner, slots, inputs, batch_size)):
            return batch_size
    return None


def beginnings(runner: ModelRunner, num_slots: int) -> dict[str, Array]:
    """State that sessions may begin from: the model's own, and session inputs of each its own, always the same."""
    generator = np.random.default_rng(1)
    return {
        state.input_name: _random(generator, state, num_slots)
        if is_session_input(state)
        else np.broadcast_to(initial_value(state), (num_slots, *state.shape))
        for state in runner.model.spec.states
    }


def random_steps(runner: ModelRunner, num_slots: int, num_steps: int = 2) -> tuple[Rows, Steps]:
    """Some slots and random inputs of a few steps [T, slots], always the same."""
    generator = np.random.default_rng(0)
    inputs = {
        tensor.name: _random(generator, tensor, num_steps, num_slots) for tensor in runner.model.input_tensors
    }
    return np.arange(num_slots) + NUM_RESERVED_SLOTS, runner.model.inputs.pack(inputs)


def _random(generator: np.random.Generator, tensor: TensorLike, *axes: int) -> Array:
    shape, dtype = (*axes, *tensor.shape), numpy_dtype(tensor.dtype)
    values = generator.uniform(-1, 1, shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
    return np.asarray(values).astype(dtype)


def _two_steps(
    runner: ModelRunner, slots: Rows, inputs: Steps, batch_size: int, at_once: bool = False
) -> list[Array]:
    """Two steps of every slot from the initial state, in batches of one size: outputs and final state."""
    runner.write(slots, beginnings(runner, len(slots)))
    outputs = runner.model.outputs.none(*inputs.shape)
    for start in range(0, len(slots), batch_size):
        rows = slice(start, start + batch_size)
        batch_rows = np.arange(len(slots[rows]))
        runner.move(slots[rows], runner.first_batch_row(0) + batch_rows)
        for steps in [slice(0, 2)] if at_once else [slice(0, 1), slice(1, 2)]:
            outputs[steps, rows] = runner.run(np.ascontiguousarray(inputs[steps, rows]))
        runner.move(runner.first_batch_row(0) + batch_rows, slots[rows])
    return [*runner.model.outputs.unpack(outputs).values(), *runner.read(slots).values()]


def _are_equal(some: list[Array], others: list[Array]) -> bool:
    """Bit for bit."""
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(some, others, strict=True))


def _probe_sizes(largest: int) -> list[int]:
    """Every size up to 9, the powers of two and their neighbours: where kernels change their way of working."""
    powers = [2**i for i in range(4, math.ceil(math.log2(largest + 1)) + 1)]
    near_powers = {size + offset for size in powers for offset in (-1, 0, 1)}
    return sorted(size for size in {*range(2, 10), *near_powers, largest} if 2 <= size <= largest)
