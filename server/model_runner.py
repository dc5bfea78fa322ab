"""Model runner: one model on one device, with the state of every session in pools that stay there.

A pool `[num_slots, ...]` for each state tensor; a session's state is a row of each. A step reads the rows of
some slots, and its commit writes the next state to rows of others or the same. Only slot numbers, inputs and outputs
cross between host and device. Which slot belongs to whom is `sessions.py`'s business.

Slot 0 holds the model's initial state and is never written; slot 1 takes what padding rows write.

Shapes: B batch, P slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import structlog

from ntm.tensor import Array, numpy_dtype
from ntm.v1 import model_pb2
from server import graphs
from server.device import Device
from server.errors import ModelFileError, ServingError
from server.spec import StepModel, initial_value

log = structlog.get_logger()

INITIAL_SLOT = 0
PADDING_SLOT = 1
NUM_RESERVED_SLOTS = 2

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _BoundBatch:
    """Everything bound once for batches of one size."""

    run: ort.IOBinding
    commit: ort.IOBinding
    read_slots: ort.OrtValue
    write_slots: ort.OrtValue
    inputs: ort.OrtValue
    outputs: Array


class ModelRunner:
    """Runs steps of one model on pools of state. Not thread-safe: one thread owns it."""

    def __init__(self, model: StepModel, device: Device, num_slots: int, max_batch_size: int) -> None:
        """Load the graphs, make the pools, and measure batch invariance.

        Args:
            model: the model, checked.
            device: where to run it.
            num_slots: rows of each pool for sessions, beside the reserved ones.
            max_batch_size: rows of one step at most.

        Raises:
            DeviceError: the device cannot be had.
            ModelFileError: ONNX Runtime cannot load the graph.
        """
        self.model = model
        self.device = device
        self.max_batch_size = max_batch_size
        spec = model.spec
        derived = graphs.derive(model.step, spec)
        try:
            self._run = device.session(derived.run)
            self._commit = device.session(derived.commit)
            self._read = device.session(derived.read)
        except ServingError:
            raise
        except Exception as error:  # ONNX Runtime raises types of its own for what it cannot load
            problem = f"ONNX Runtime cannot load it: {error}".split("\n", 1)[0]
            raise ModelFileError(model.label, [problem]) from error
        self._input_dtype = numpy_dtype(spec.input.dtype)
        self._output_dtype = numpy_dtype(spec.output.dtype)
        total_slots = num_slots + NUM_RESERVED_SLOTS
        self._pools = {state.input_name: self._rows(state, total_slots) for state in spec.states}
        self._next = {state.input_name: self._rows(state, max_batch_size) for state in spec.states}
        self._bound: dict[int, _BoundBatch] = {}
        self.padded_batch_size: int | None = None
        """What every batch is padded to, or None: see `_ensure_batch_invariance`."""
        self.write(
            np.array([INITIAL_SLOT]),
            {state.input_name: initial_value(state)[np.newaxis] for state in spec.states},
        )
        self.is_batch_invariant = self._ensure_batch_invariance(min(num_slots, max_batch_size))

    def run(self, read_slots: Slots, inputs: Array) -> Array:
        """Run one step of B sessions; `commit` then stores the next state. No state changes, also when it raises.

        Rows are independent: one that is not finite spoils no other.

        Args:
            read_slots: [B], where each row's state is.
            inputs: [B, ...input shape], of the input's dtype.

        Returns:
            [B, ...output shape], valid until the next call.
        """
        num_rows = len(read_slots)
        size = self.padded_batch_size or num_rows
        if size != num_rows:
            padding = size - num_rows
            read_slots = np.concatenate([read_slots, np.full(padding, INITIAL_SLOT)])
            inputs = np.concatenate([inputs, np.zeros((padding, *inputs.shape[1:]), inputs.dtype)])
        bound = self._bound.get(size) or self._bind(size)
        bound.read_slots.update_inplace(read_slots)
        bound.inputs.update_inplace(np.ascontiguousarray(inputs))
        self._run.run_with_iobinding(bound.run)
        bound.run.synchronize_outputs()
        return bound.outputs[:num_rows]

    def commit(self, write_slots: Slots) -> None:
        """Store the next state of the batch that ran last.

        Args:
            write_slots: [B], where each row's next state goes, none twice. If this raises, what is in them is
                undefined; all other slots are as they were.
        """
        size = self.padded_batch_size or len(write_slots)
        if size != len(write_slots):
            write_slots = np.concatenate([write_slots, np.full(size - len(write_slots), PADDING_SLOT)])
        bound = self._bound[size]
        bound.write_slots.update_inplace(write_slots)
        self._commit.run_with_iobinding(bound.commit)
        bound.commit.synchronize_outputs()

    def read(self, slots: Slots) -> dict[str, Array]:
        """The state in some slots, by name: [B, ...state shape] each, a copy."""
        feeds = {graphs.pool(state): self._pools[state.input_name] for state in self.model.spec.states}
        feeds[graphs.SLOTS] = self._on_device(slots)
        names = [graphs.rows(state) for state in self.model.spec.states]
        values = self._read.run_with_ort_values(names, feeds)
        return {
            state.input_name: value.numpy().copy()
            for state, value in zip(self.model.spec.states, values, strict=True)
        }

    def write(self, slots: Slots, states: dict[str, Array]) -> None:
        """Put state into some slots.

        Args:
            slots: [B], none twice.
            states: by name, [B, ...state shape] of the state's dtype.
        """
        values = {name: self._on_device(np.ascontiguousarray(array)) for name, array in states.items()}
        binding = self._commit.io_binding()
        binding.bind_ortvalue_input(graphs.SLOTS, self._on_device(slots))
        for state in self.model.spec.states:
            binding.bind_ortvalue_input(graphs.rows(state), values[state.input_name])
        self._bind_pools(binding, update=True)
        self._commit.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _bind(self, size: int) -> _BoundBatch:
        """Bind every buffer for batches of `size` rows, once."""
        spec = self.model.spec
        read_slots = self._on_device(np.zeros(size, np.int64))
        write_slots = self._on_device(np.zeros(size, np.int64))
        inputs = self._on_device(np.zeros((size, *spec.input.shape), self._input_dtype))
        outputs = np.zeros((size, *spec.output.shape), self._output_dtype)

        run = self._run.io_binding()
        run.bind_ortvalue_input(graphs.SLOTS, read_slots)
        run.bind_ortvalue_input(graphs.INPUT, inputs)
        self._bind_pools(run, update=False)
        run.bind_output(graphs.OUTPUT, "cpu", 0, outputs.dtype, outputs.shape, outputs.ctypes.data)
        commit = self._commit.io_binding()
        commit.bind_ortvalue_input(graphs.SLOTS, write_slots)
        self._bind_pools(commit, update=True)
        for state in spec.states:
            # A batch uses the first rows of memory that is there for the largest.
            shape, pointer = (size, *state.shape), self._next[state.input_name].data_ptr()
            where = (self.device.kind, self.device.device_id, numpy_dtype(state.dtype), shape, pointer)
            run.bind_output(graphs.rows(state), *where)
            commit.bind_input(graphs.rows(state), *where)

        bound = _BoundBatch(run, commit, read_slots, write_slots, inputs, outputs)
        self._bound[size] = bound
        return bound

    def _bind_pools(self, binding: ort.IOBinding, update: bool) -> None:
        """Bind the pools as inputs and, to update them in place, as outputs on the same memory."""
        for state in self.model.spec.states:
            pool = self._pools[state.input_name]
            binding.bind_ortvalue_input(graphs.pool(state), pool)
            if update:
                binding.bind_ortvalue_output(graphs.updated_pool(state), pool)

    def _rows(self, state: model_pb2.StateSpec, num_rows: int) -> ort.OrtValue:
        """Device memory for so many rows of a state, zero."""
        return self._on_device(np.zeros((num_rows, *state.shape), numpy_dtype(state.dtype)))

    def _on_device(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self.device.kind, self.device.device_id)

    def _ensure_batch_invariance(self, largest: int) -> bool:
        """Measure whether rows depend on their batch; if they do, pad every batch to one size, measure again."""
        try:
            if self._differing_batch_size(largest) is None:
                return True
            self.padded_batch_size = self.max_batch_size
            differing = self._differing_batch_size(largest)
        except Exception as error:  # ONNX Runtime raises types of its own for what a model does
            log.warning(
                "batch invariance could not be measured: the step fails on random inputs",
                model=self.model.label,
                error=str(error).split("\n", 1)[0],
            )
            return False
        log.warning(
            "the step's results depend on the batch's size, so every batch is padded to the largest",
            model=self.model.label,
            batch_size=self.padded_batch_size,
            is_batch_invariant=differing is None,
            cost="a single step costs as much as a full batch; `python -m export` writes steps that need no padding",
        )
        return differing is None

    def _differing_batch_size(self, largest: int) -> int | None:
        """The first batch size at which some row's output or state differs from a batch of one, or None."""
        spec = self.model.spec
        generator = np.random.default_rng(0)
        shape = (largest, *spec.input.shape)
        inputs = (
            generator.uniform(-1, 1, shape).astype(self._input_dtype)
            if self._input_dtype.kind == "f"
            else generator.integers(0, 2, shape).astype(self._input_dtype)
        )
        slots = np.arange(largest) + NUM_RESERVED_SLOTS
        alone = self._two_steps(slots, inputs, batch_size=1)
        for batch_size in _probe_sizes(largest):
            together = self._two_steps(slots, inputs, batch_size)
            if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(alone, together, strict=True)):
                return batch_size
        return None

    def _two_steps(self, slots: Slots, inputs: Array, batch_size: int) -> list[Array]:
        """Two steps of every slot from the initial state, in batches of one size: outputs and final state."""
        outputs = []
        for read_slots in (np.full_like(slots, INITIAL_SLOT), slots):
            for start in range(0, len(slots), batch_size):
                rows = slice(start, start + batch_size)
                outputs.append(self.run(read_slots[rows], inputs[rows]).copy())
                self.commit(slots[rows])
        return [np.concatenate(outputs), *self.read(slots).values()]


def _probe_sizes(largest: int) -> list[int]:
    """Every size up to 9, the powers of two and their neighbours: where kernels change their way of working."""
    powers = [2**i for i in range(4, math.ceil(math.log2(largest + 1)) + 1)]
    near_powers = {size + offset for size in powers for offset in (-1, 0, 1)}
    return sorted(size for size in {*range(2, 10), *near_powers, largest} if 2 <= size <= largest)
