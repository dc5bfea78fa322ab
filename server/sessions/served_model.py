"""Served model: one version of a model in service, with its engine and its slots.

It carries messages to the engine's thread and brings those that ended back into the event loop. Whose messages
they are is `sessions.py`'s business; `lifecycle.py` makes one for each model that `repository.py` finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from server.engine.engine import BatchReport, Engine
from server.engine.request import Message
from server.model.spec import StepModel
from server.runtime.runner import ModelRunner
from server.runtime.slots import SlotPool
from server.sessions.retry_window import RetryWindows
from server.sessions.table import Room
from server.storage.codec import fingerprint

log = structlog.get_logger()


@dataclass(frozen=True)
class SessionLimits:
    """What sessions of one model may take."""

    max_resident_sessions: int
    max_pending_messages: int
    retry_window_steps: int


class ServedModel:
    """One version of a model in service: its engine and its slots."""

    def __init__(
        self,
        runner: ModelRunner,
        slots: SlotPool,
        limits: SessionLimits,
        loop: asyncio.AbstractEventLoop,
        on_batch: Callable[[BatchReport], None] = lambda _: None,
    ) -> None:
        """Start the engine; it reports to `loop`."""
        self.model: StepModel = runner.model
        self.runner = runner
        self.limits = limits
        self.slots = slots
        self.room: Room[Any, Any] = Room(limits.max_resident_sessions)
        self.histories = RetryWindows(
            limits.max_resident_sessions + 1,
            self.model.no_inputs,
            self.model.no_outputs,
            limits.retry_window_steps,
        )
        self.fingerprint = fingerprint(runner.model, runner.device, runner.padded_batch_size)
        self.num_pending = 0
        self.is_leaving = False
        """Its file is gone from the models directory: it serves the sessions it has, and takes no new ones."""
        self._outbox: list[Message] = []
        self.loop = loop
        self.engine = Engine(runner, self._hand_back, on_batch)

    @property
    def num_sessions(self) -> int:
        """Sessions in memory."""
        return self.room.num_taken

    def submit(self, message: Message) -> None:
        """Run a message; its `on_ended` is called in the event loop when it has ended.

        Messages that come in one turn of the event loop go to the engine together, so that they run together.
        """
        if not self._outbox:
            self.loop.call_soon(self._flush)
        self._outbox.append(message)

    def submit_now(self, messages: list[Message]) -> None:
        """Run messages, and what was submitted in this turn of the event loop, without waiting for its end."""
        self._outbox += messages
        self._flush()

    def withdraw(self, message: Message, row: int | None = None) -> bool:
        """Take a message back that has not begun, or only one of its sessions; says whether it is out."""
        if row is not None and message.num_rows > 1:
            return self.engine.leave_out(message, row)
        if message in self._outbox:
            self._outbox.remove(message)
        elif not self.engine.withdraw(message):
            return False
        message.on_ended = None  # which knows it, as in `_end`
        return True

    def close(self) -> None:
        """End the engine and free the device's memory, when no session is left. Blocks."""
        self.engine.close()
        self.runner.close()

    def _flush(self) -> None:
        if self._outbox:
            self.engine.submit(self._outbox)
            self._outbox = []

    def _hand_back(self, messages: list[Message]) -> None:
        self.loop.call_soon_threadsafe(self._end, messages)

    def _end(self, messages: list[Message]) -> None:
        for message in messages:
            # It knows the message: without this the two would stay until the collector comes.
            on_ended, message.on_ended = message.on_ended, None
            assert on_ended is not None
            try:
                on_ended(message)
            except Exception as error:  # a bug in one must not keep those behind it waiting
                log.error("what a message gave was lost", model=self.model.label, exc_info=error)
