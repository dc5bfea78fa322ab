"""Model runner: one model on one device, with the state of every session in pools that stay there.

`probe.py` makes one, after measuring how its rows are best run.

A pool `[num_rows, ...]` for each state tensor. Row 0 holds the model's initial state and is never written. Then come
the slots, which `sessions/` gives out. The last rows are batch rows, in banks that hold the largest batch each. Every
bank has a buffer of rows, and one more is spare: a run reads the first rows of its bank's buffer and leaves the next
state in the same rows of the spare one. The two change over then, so that the bank's next run reads what this one has
left. So a batch that goes on copies no state, several that take turns have banks of their own, a run that fails has
spoiled none, and what is written next was read last: it is still in the processor's cache. Only row numbers, inputs
and outputs cross between host and device.

Shapes: B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ntm.tensor import Array, numpy_dtype
from ntm.v1 import model_pb2
from server.errors import ModelFileError, ServingError
from server.model.layout import Steps
from server.model.spec import StepModel, growing, initial_value
from server.runtime import graphs
from server.runtime.provider import Device

INITIAL_SLOT = 0
NUM_RESERVED_SLOTS = 1

# Callers who take turns with a batch each are rarely more; and their rows take no more than a quarter of what slots do,
# unless those of one bank and the spare ones do.
_MOST_BANKS = 8
_SLOTS_BY_BATCH_ROWS = 4

# What runs are bound to is kept for the next of as many steps and rows, but not without end where inputs are large.
_MOST_BOUND_BYTES = 256 * 2**20

# What vector code likes; also where a tensor's bits could depend on its address.
_ALIGNMENT_BYTES = 64

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Steps:
    """What runs of as many steps and rows take and give, tensor by tensor."""

    inputs: dict[str, ort.OrtValue]
    outputs: dict[str, Array]
    packed: Steps | None
    """[K, B], the outputs seen as steps, where one tensor is all of a step."""
    num_bytes: int


@dataclass(frozen=True)
class _BoundRun:
    """Everything bound once for runs from one buffer to another."""

    binding: ort.IOBinding
    steps: _Steps


@dataclass(frozen=True)
class _BoundMove:
    """Everything bound once for moves of so many rows."""

    binding: ort.IOBinding
    sources: ort.OrtValue
    targets: ort.OrtValue


class ModelRunner:
    """Runs steps of one model on pools of state. Not thread-safe: one thread owns it."""

    padded_batch_size: int | None = None
    """What every batch is padded to, or None."""
    is_batch_invariant = False
    """Whether a session's bits are known not to depend on what else is in its batch."""
    can_scan = False
    """Whether steps may be run several at once, with the same results."""

    def __init__(
        self, model: StepModel, device: Device, num_slots: int, max_batch_size: int, row_by_row: bool = False
    ) -> None:
        """Load the graphs and make the pools.

        Args:
            model: the model, checked.
            device: where to run it.
            num_slots: how many slots to have.
            max_batch_size: rows of one step at most.
            row_by_row: whether rows are run one after another, since the graph takes one session at a time.

        Raises:
            DeviceError: the device cannot be had.
            ModelFileError: ONNX Runtime cannot load the graph.
        """
        self.model = model
        self.device = device
        self.num_slots = num_slots
        self.max_batch_size = max_batch_size
        self.row_by_row = row_by_row
        spec = model.spec
        try:
            derived = graphs.derive(model.step, spec, row_by_row)
            folds = not (row_by_row and graphs.has_branches_in_branches(model.step))
            self._run = device.session(derived.run, folds)
            self._refuse_other_shapes()
            self._scan = device.session(derived.scan, folds)
            self._move = device.session(derived.move)
            self._read = device.session(derived.read)
            self._write = device.session(derived.write)
        except ServingError:
            raise
        except Exception as error:  # ONNX Runtime raises types of its own for what it cannot load
            problem = f"ONNX Runtime cannot load it: {error}".split("\n", 1)[0]
            raise ModelFileError(model.label, [problem]) from error
        step = math.lcm(*(_ALIGNMENT_BYTES // math.gcd(_row_bytes(s), _ALIGNMENT_BYTES) for s in spec.states))
        self.num_batch_rows = num_batch_rows = _round_up(max_batch_size, step)
        first = _round_up(num_slots + NUM_RESERVED_SLOTS, step)
        self.num_banks = max(1, min(_MOST_BANKS, num_slots // (_SLOTS_BY_BATCH_ROWS * max_batch_size) - 1))
        num_front_buffers = self.num_banks + 2
        self._first_of_batch_rows = first
        self.num_rows = first + num_batch_rows * num_front_buffers
        """Of each pool: slots and batch rows."""
        self._pools = {
            state.input_name: self._on_device(
                _aligned_zeros((self.num_rows, *state.shape), numpy_dtype(state.dtype))
            )
            for state in spec.states
        }
        self._row_numbers = np.arange(self.num_rows)
        *self._front_buffers, self._spare_buffer, self._reset_buffer = range(num_front_buffers)
        self._bank_of = np.full(self.num_rows, -1)
        """By row, what `_front_buffers` says: the bank whose next run reads it, or -1."""
        self._bank_of_batch_rows = self._bank_of[first:].reshape(num_front_buffers, num_batch_rows)
        """The same of the batch rows, by buffer: a view."""
        self._bank_of_batch_rows[: self.num_banks] = np.arange(self.num_banks)[:, np.newaxis]
        self._run_options = ort.RunOptions()
        # What is the default anyway. Unsaid, ONNX Runtime's Python looks it up in vain before each run, for 60 µs.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        self._steps: dict[tuple[int, int], _Steps] = {}
        self._runs: dict[tuple[int, int, int, int], _BoundRun] = {}
        self._moves: dict[int, _BoundMove] = {}
        self.turn_times_s: dict[int, float] = {}
        """How long a step of so many rows takes, for a few numbers of rows; empty if it was not measured."""
        self.write(
            np.array([INITIAL_SLOT]),
            {state.input_name: initial_value(state)[np.newaxis] for state in spec.states},
        )

    @property
    def rows_are_run(self) -> str:
        """How the rows of a batch are run, in words."""
        if self.row_by_row:
            return "one after another"
        return f"together, padded to {self.padded_batch_size}" if self.padded_batch_size else "together"

    @property
    def turn_times_ms(self) -> dict[str, float]:
        """`turn_times_s` in milliseconds, by names for the log."""
        return {f"step_of_{size}_ms": round(time_s * 1e3, 3) for size, time_s in self.turn_times_s.items()}

    def first_batch_row(self, bank: int) -> int:
        """The row that the bank's next run reads first; every run there that succeeds changes it."""
        return self._first_of(self._front_buffers[bank])

    def batch_rows(self, bank: int, num_batch_rows: int) -> Rows:
        """The rows of a bank's first batch rows, as of now; not to be written to."""
        first = self.first_batch_row(bank)
        return self._row_numbers[first : first + num_batch_rows]

    @property
    def spare_first_row(self) -> int:
        """The row that the next run writes first, of whatever bank it is."""
        return self._first_of(self._spare_buffer)

    def _first_of(self, buffer: int) -> int:
        return self._first_of_batch_rows + buffer * self.num_batch_rows

    def banks_of(self, rows: Rows) -> Rows:
        """The banks [B] whose next run reads these rows [B], each as a batch row; -1 where none does."""
        return self._bank_of[rows]

    def run(self, inputs: Steps, bank: int = 0, initial_rows: Rows | None = None) -> Steps:
        """Run steps of the sessions whose state is in the first B batch rows of a bank, one after another.

        The device is asked once for all of them, unless some begin from the initial state, and needs nobody's attention
        meanwhile. If this raises, no row that is anybody's has changed. Rows are independent: one that is not finite
        spoils no other.

        Args:
            inputs: [K, B], contiguous, of the model's `inputs`. What a K and B need is kept for the next time, so K
                should be one of few numbers.
            bank: which.
            initial_rows: [B], the rows that hold the state from which each session's steps that are reset begin. None:
                the model's initial state for all.

        Returns:
            [K, B] of the model's `outputs`, valid until the next call. The state after the last step is in the first B
            batch rows.
        """
        num_rows = inputs.shape[1]
        size = self.padded_batch_size or num_rows
        if size != num_rows:
            padded = self.model.inputs.none(len(inputs), size)
            padded[:, :num_rows] = inputs
            inputs = padded
            # What a session that failed has left there must not fail others.
            empty = np.arange(num_rows, size) + self.first_batch_row(bank)
            self.move(np.full_like(empty, INITIAL_SLOT), empty)
        resets = self.model.inputs.resets(inputs)
        if np.count_nonzero(resets):  # `any` takes four times as long for a few
            outputs = self._run_with_resets(inputs, resets, bank, initial_rows)
        else:
            outputs = self._run_between(self._front_buffers[bank], self._spare_buffer, inputs)
            self._change_over(bank, self._spare_buffer)
        return outputs[:, :num_rows]

    def interrupt(self) -> None:
        """Make the run in progress raise, at its next node of the graph; may be called in any thread."""
        self._run_options.terminate = True

    def allow_runs(self) -> None:
        """Let runs go on after one was interrupted."""
        self._run_options.terminate = False

    def _run_with_resets(
        self, inputs: Steps, resets: npt.NDArray[np.bool_], bank: int, initial_rows: Rows | None
    ) -> Steps:
        """As `run`, [K, B] with the padding, in pieces that no reset interrupts; what the bank has stays as it is."""
        here, there = self._reset_buffer, self._spare_buffer
        if initial_rows is None:
            initial_rows = np.full(inputs.shape[1], INITIAL_SLOT)
        sources = self._row_numbers[self.first_batch_row(bank) :][: inputs.shape[1]].copy()
        sources[: len(initial_rows)][resets[0, : len(initial_rows)]] = initial_rows[
            resets[0, : len(initial_rows)]
        ]
        self.move(sources, self._first_of(here) + np.arange(len(sources)))
        pieces, first = [], 0
        cuts = [step for step in np.flatnonzero(resets.any(axis=1)).tolist() if step]
        for cut in [*cuts, len(inputs)]:
            while first < cut:
                # Few numbers of steps, as `run` asks for.
                num_steps = _power_of_two(cut - first) if self.can_scan else 1
                piece = np.ascontiguousarray(inputs[first : first + num_steps])
                pieces.append(self._run_between(here, there, piece).copy())
                here, there, first = there, here, first + num_steps
            if cut < len(inputs):
                rows = np.flatnonzero(resets[cut])
                self.move(initial_rows[rows], self._first_of(here) + rows)
        if here == self._reset_buffer:
            self._reset_buffer = self._spare_buffer
        self._change_over(bank, here)
        return np.concatenate(pieces)

    def _run_between(self, buffer: int, next_buffer: int, inputs: Steps) -> Steps:
        """Run steps [K, B] from the batch rows of one buffer to those of another."""
        num_steps, size = inputs.shape
        bound = self._runs.get((buffer, next_buffer, num_steps, size)) or self._bind_run(
            buffer, next_buffer, num_steps, size
        )
        for name, value in bound.steps.inputs.items():
            value.update_inplace(np.ascontiguousarray(self.model.inputs.tensor(inputs, name)))
        (self._run if num_steps == 1 else self._scan).run_with_iobinding(bound.binding, self._run_options)
        bound.binding.synchronize_outputs()
        if bound.steps.packed is not None:
            return bound.steps.packed
        return self.model.outputs.pack(bound.steps.outputs)

    def _change_over(self, bank: int, next_buffer: int) -> None:
        """From now on a bank's state is in another buffer, and its old one is spare."""
        buffer = self._front_buffers[bank]
        self._front_buffers[bank], self._spare_buffer = next_buffer, buffer
        self._bank_of_batch_rows[next_buffer] = bank
        self._bank_of_batch_rows[buffer] = -1

    def move(self, sources: Rows, targets: Rows) -> None:
        """Copy the state in some rows to others.

        Args:
            sources: [B].
            targets: [B], none twice; what is there is read before it is overwritten. If this raises, what is in
                them is undefined.
        """
        bound = self._moves.get(len(sources)) or self._bind_move(len(sources))
        bound.sources.update_inplace(sources)
        bound.targets.update_inplace(targets)
        self._move.run_with_iobinding(bound.binding)
        bound.binding.synchronize_outputs()

    def read(self, slots: Rows) -> dict[str, Array]:
        """The state in some slots, by name: [B, ...state shape] each, a copy."""
        feeds = {graphs.pool(state): self._pools[state.input_name] for state in self.model.spec.states}
        feeds[graphs.ROWS] = self._on_device(slots)
        names = [graphs.content(state) for state in self.model.spec.states]
        values = self._read.run_with_ort_values(names, feeds)
        return {
            state.input_name: value.numpy().copy()
            for state, value in zip(self.model.spec.states, values, strict=True)
        }

    def write(self, slots: Rows, states: dict[str, Array]) -> None:
        """Put state into some slots.

        Args:
            slots: [B], none twice.
            states: by name, [B, ...state shape] of the state's dtype.
        """
        values = {name: self._on_device(np.ascontiguousarray(array)) for name, array in states.items()}
        binding = self._write.io_binding()
        binding.bind_ortvalue_input(graphs.TARGETS, self._on_device(slots))
        for state in self.model.spec.states:
            binding.bind_ortvalue_input(graphs.content(state), values[state.input_name])
        self._bind_pools(binding)
        self._write.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def close(self) -> None:
        """Free the graphs, the pools and what is bound to them; nothing can be run afterwards."""
        self._runs.clear()
        self._steps.clear()
        self._moves.clear()
        self._pools.clear()
        del self._run, self._scan, self._move, self._read, self._write

    def _refuse_other_shapes(self) -> None:
        """Hold what a step gives against the spec: what the graph leaves open is known only when it runs.

        Raises:
            ModelFileError: some shape differs, or a state grows.
        """
        spec = self.model.spec
        feeds = {
            graphs.given(tensor): np.zeros((1, *self._row_shape(tensor)), numpy_dtype(tensor.dtype))
            for tensor in spec.inputs
        }
        for state in spec.states:
            feeds[graphs.content(state)] = initial_value(state).reshape(1, *self._row_shape(state))
        names = [*map(graphs.taken, spec.outputs), *map(graphs.next_content, spec.states)]
        try:
            values = self._run.run(names, feeds)
        except (
            Exception
        ):  # it fails on zeros, which need not be what callers send; a run checks the shapes as well
            return
        shapes = {name: value.shape[1:] for name, value in zip(names, values, strict=True)}
        problems = [
            growing(state, self._row_shape(state), shapes[graphs.next_content(state)])
            for state in spec.states
            if shapes[graphs.next_content(state)] != self._row_shape(state)
        ]
        for tensor in spec.outputs:
            shape = self._row_shape(tensor)
            if shapes[graphs.taken(tensor)] != shape:
                problems.append(
                    f"output {tensor.name!r} is {list(shape)} by the spec, and a step gives "
                    f"{list(shapes[graphs.taken(tensor)])}"
                )
        if problems:
            raise ModelFileError(self.model.label, problems)

    def _make_steps(self, num_steps: int, size: int) -> _Steps:
        """Make what runs of as many steps and rows take and give, once."""
        model, axes = self.model, (num_steps, size)
        inputs = {
            tensor.name: _aligned_zeros((*axes, *tensor.shape), numpy_dtype(tensor.dtype))
            for tensor in model.input_tensors
        }
        outputs = {
            tensor.name: _aligned_zeros((*axes, *tensor.shape), numpy_dtype(tensor.dtype))
            for tensor in model.output_tensors
        }
        packed = None
        if len(outputs) == 1:
            [values] = outputs.values()
            packed = values.reshape(-1).view(model.outputs.dtype).reshape(axes)
        steps = _Steps(
            {name: self._on_device(array) for name, array in inputs.items()},
            outputs,
            packed,
            sum(array.nbytes for array in [*inputs.values(), *outputs.values()]),
        )
        if sum(kept.num_bytes for kept in self._steps.values()) + steps.num_bytes > _MOST_BOUND_BYTES:
            self._runs.clear()
            self._steps.clear()
        self._steps[axes] = steps
        return steps

    def _row_shape(self, tensor: graphs.TensorLike) -> tuple[int, ...]:
        return graphs.row_shape(tensor, self.row_by_row)

    def _bind_run(self, buffer: int, next_buffer: int, num_steps: int, size: int) -> _BoundRun:
        """Bind every buffer for runs of as many steps and rows from one buffer to another, once."""
        model = self.model
        steps = self._steps.get((num_steps, size)) or self._make_steps(num_steps, size)
        where = (self.device.kind, self.device.device_id)
        binding = (self._run if num_steps == 1 else self._scan).io_binding()
        axes = (size,) if num_steps == 1 else (num_steps, size)
        for tensor in model.input_tensors:
            value = steps.inputs[tensor.name]
            content = (numpy_dtype(tensor.dtype), (*axes, *self._row_shape(tensor)))
            binding.bind_input(graphs.given(tensor), *where, *content, value.data_ptr())
        for tensor in model.output_tensors:
            values = steps.outputs[tensor.name]
            binding.bind_output(
                graphs.taken(tensor),
                "cpu",
                0,
                values.dtype,
                (*axes, *self._row_shape(tensor)),
                values.ctypes.data,
            )
        for state in model.spec.states:
            pool, row_bytes = self._pools[state.input_name].data_ptr(), _row_bytes(state)
            rows = (*where, numpy_dtype(state.dtype), (size, *self._row_shape(state)))
            here, there = self._first_of(buffer) * row_bytes, self._first_of(next_buffer) * row_bytes
            binding.bind_input(graphs.content(state), *rows, pool + here)
            binding.bind_output(graphs.next_content(state), *rows, pool + there)
        bound = _BoundRun(binding, steps)
        self._runs[buffer, next_buffer, num_steps, size] = bound
        return bound

    def _bind_move(self, size: int) -> _BoundMove:
        """Bind every buffer for moves of `size` rows, once."""
        sources, targets = (
            self._on_device(np.zeros(size, np.int64)),
            self._on_device(np.zeros(size, np.int64)),
        )
        binding = self._move.io_binding()
        binding.bind_ortvalue_input(graphs.ROWS, sources)
        binding.bind_ortvalue_input(graphs.TARGETS, targets)
        self._bind_pools(binding)
        self._moves[size] = bound = _BoundMove(binding, sources, targets)
        return bound

    def _bind_pools(self, binding: ort.IOBinding) -> None:
        """Bind the pools as inputs and, to change them in place, as outputs on the same memory."""
        for state in self.model.spec.states:
            pool = self._pools[state.input_name]
            binding.bind_ortvalue_input(graphs.pool(state), pool)
            binding.bind_ortvalue_output(graphs.updated_pool(state), pool)

    def _on_device(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self.device.kind, self.device.device_id)


def _power_of_two(number: int) -> int:
    """The largest that is not above a number."""
    return 1 << number.bit_length() - 1


def _row_bytes(state: model_pb2.StateSpec) -> int:
    return math.prod(state.shape) * numpy_dtype(state.dtype).itemsize


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros that begin where vector code likes it; numpy alone promises 16 bytes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
