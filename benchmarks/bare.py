"""Bare: a step in ONNX Runtime and nothing else, the state it gives bound as the state it takes next.

What the engine and the server reach is held against this.

Shapes: B batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from server.runtime.provider import Device

CPU = Device("cpu", "cpu", 0, fell_back=False)


class BareLoop:
    """One step after another of a batch: two bindings that swap their buffers, made once."""

    def __init__(self, model: bytes, batch_size: int) -> None:
        """Bind a model whose first input and output are the step's own, and whose others are its state, in order."""
        self._session = CPU.session(model)
        self._batch_size = batch_size
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        step_input, step_output = self._values(inputs[0].shape), self._values(outputs[0].shape)
        one, other = ([self._values(state.shape) for state in inputs[1:]] for _ in range(2))
        self._bindings = []
        for before, after in ((one, other), (other, one)):
            binding = self._session.io_binding()
            values = [step_input, *before], [step_output, *after]
            for argument, value in zip(inputs, values[0], strict=True):
                binding.bind_ortvalue_input(argument.name, value)
            for argument, value in zip(outputs, values[1], strict=True):
                binding.bind_ortvalue_output(argument.name, value)
            self._bindings.append(binding)

    def measure(self, duration_s: float) -> Mapping[str, float]:
        """Run steps for about so long."""
        run, (one, other) = self._session.run_with_iobinding, self._bindings
        num_runs, start_s, start_cpu_s = 0, time.perf_counter(), time.process_time()
        while (wall_s := time.perf_counter() - start_s) < duration_s:
            for _ in range(5):
                run(one)
                run(other)
            num_runs += 10
        num_steps = num_runs * self._batch_size
        return {
            "steps_per_s": num_steps / wall_s,
            "us_per_turn": wall_s / num_runs * 1e6,
            "cpu_us_per_step": (time.process_time() - start_cpu_s) / num_steps * 1e6,
        }

    def _values(self, shape: list[Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.full((self._batch_size, *shape[1:]), 0.01, np.float32))
