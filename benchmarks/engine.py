"""Engine: the engine by itself, without sessions and without gRPC.

Whoever is told that a request has ended submits the next at once, in the engine's own thread, so that nothing but
the engine's work is measured.

Shapes: S sessions, T steps of a request.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.bare import CPU
from benchmarks.measuring import Metrics
from ntm.tensor import Array
from server.engine.engine import Engine
from server.engine.request import EngineRequest
from server.model.spec import load
from server.runtime.probe import load_runner
from server.runtime.runner import NUM_RESERVED_SLOTS
from server.settings import ServerSettings

# As many as a server has by default: with few there is room for one bank only, and batches that take turns are copied.
_NUM_SLOTS = 2 * ServerSettings.model_fields["max_resident_sessions"].default


class EngineAlone:
    """An engine that runs one request after another of the same sessions."""

    def __init__(self, model: Path, num_sessions: int, num_steps: int, together: bool = True) -> None:
        """Take a model file.

        Args:
            model: the file.
            num_sessions: S; the largest batch has as many rows.
            num_steps: T.
            together: the sessions share a request, as those of a BatchStep do; else each has its own.
        """
        self._runner = load_runner(load(model, "copy", 1), CPU, _NUM_SLOTS, num_sessions)
        self._groups = (
            [range(num_sessions)] if together else [range(row, row + 1) for row in range(num_sessions)]
        )
        self._num_sessions, self._num_steps = num_sessions, num_steps

    def measure(self, duration_s: float) -> Metrics:
        """Run requests for about so long."""
        num_done, is_over, all_ended = 0, False, threading.Event()
        num_unanswered = len(self._groups)

        def on_ended(requests: list[EngineRequest]) -> None:
            nonlocal num_done, num_unanswered
            for request in requests:
                assert not request.errors
                num_done += request.num_rows * self._num_steps
            if is_over:
                num_unanswered -= len(requests)
                if not num_unanswered:
                    all_ended.set()
                return
            engine.submit([_next(request) for request in requests])

        engine = Engine(self._runner, on_ended)
        inputs = np.random.default_rng(0).integers(0, 2, (self._num_sessions, self._num_steps, 9))
        inputs = inputs.astype(np.float32)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        engine.submit([self._first(group, inputs[group.start : group.stop]) for group in self._groups])
        time.sleep(duration_s)
        is_over = True
        all_ended.wait()
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        engine.close()
        return {
            "steps_per_s": num_done / wall_s,
            "us_per_turn": wall_s / num_done * self._num_sessions * 1e6,
            "cpu_us_per_step": cpu_s / num_done * 1e6,
        }

    def _first(self, rows: range, inputs: Array) -> EngineRequest:
        """A request of some sessions; each has two slots, a batch apart."""
        layout = self._runner.model.inputs
        slots = [NUM_RESERVED_SLOTS + row for row in rows]
        others = [slot + self._num_sessions for slot in slots]
        return EngineRequest(
            [""] * len(rows), [0] * len(rows), layout.pack({layout.names[0]: inputs}), slots, others
        )


def _next(request: EngineRequest) -> EngineRequest:
    """The same steps once more, from where a request has ended to where it began."""
    return EngineRequest(
        request.session_ids, request.first_steps, request.inputs, request.write_slots, request.slots
    )
