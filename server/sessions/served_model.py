"""Served model: one version of a model in service, with its engine, its slots and its sessions.

It carries requests to the engine's thread and brings those that ended back into the event loop. `executor.py` says what
runs; `launch.py` makes one for each model that `model/repository.py` finds.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from server.engine.engine import BatchReport, Engine
from server.engine.request import EngineRequest
from server.model.spec import StepModel
from server.runtime.runner import ModelRunner
from server.runtime.slots import SlotPool
from server.sessions.request import EngineCall, StepRequest
from server.sessions.table import SessionTable
from server.storage.codec import fingerprint


@dataclass(frozen=True)
class SessionLimits:
    """What sessions of one model may take."""

    max_resident_sessions: int
    max_pending_messages: int
    retry_window_steps: int
    step_timeout_s: float = 30.0
    """Seconds that a run may take."""
    max_queue_wait_s: float = math.inf
    """Seconds that a caller's message may wait for its first turn."""


class ServedModel:
    """One version of a model in service."""

    def __init__(
        self,
        runner: ModelRunner,
        slots: SlotPool,
        limits: SessionLimits,
        commit: Callable[[ServedModel, list[StepRequest]], None],
        on_batch: Callable[[BatchReport], None] = lambda _: None,
    ) -> None:
        """Start the engine; to be called in the event loop.

        Args:
            runner: the model on its device.
            slots: of the runner's pools.
            limits: what sessions may take.
            commit: called in the event loop with the steps that a batch ended.
            on_batch: called in the engine's thread after every batch.
        """
        self.model: StepModel = runner.model
        self.runner = runner
        self.limits = limits
        self.slots = slots
        self.table = SessionTable(limits.max_resident_sessions, self.model, limits.retry_window_steps)
        self.fingerprint = fingerprint(runner.model, runner.device, runner.padded_batch_size)
        self.num_pending = 0
        """Entries in the queues of its sessions, each counted for every session."""
        self.is_draining = False
        """Its file is gone from the models directory: it serves the sessions it has, and takes no new ones."""
        self._commit = commit
        self._loop = asyncio.get_running_loop()
        self.engine = Engine(
            runner, self._hand_back, on_batch, limits.step_timeout_s, limits.max_queue_wait_s
        )

    @property
    def num_sessions(self) -> int:
        """Sessions in memory."""
        return self.table.num_taken

    def submit(self, requests: Sequence[StepRequest]) -> None:
        """Run steps; the executor commits what has ended."""
        self.engine.submit(requests)

    async def run(self, call: EngineCall) -> None:
        """Run a request of the server's own, and wait until it has ended."""
        self.engine.submit([call])
        await asyncio.shield(call.future)

    def close(self) -> None:
        """End the engine and free the device's memory, when no session is left. Blocks."""
        self.engine.close()
        self.runner.close()

    def _hand_back(self, ended: list[EngineRequest]) -> None:
        self._loop.call_soon_threadsafe(self._take_back, ended)

    def _take_back(self, ended: list[EngineRequest]) -> None:
        steps = []
        for request in ended:
            if isinstance(request, EngineCall):
                request.future.set_result(None)
            else:
                steps.append(cast(StepRequest, request))
        if steps:
            self._commit(self, steps)
