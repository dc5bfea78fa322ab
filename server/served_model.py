"""Served model: one version of a model in service, with its engine and its slots.

It carries messages to the engine's thread and brings those that ended back into the event loop. Whose messages
they are is `sessions.py`'s business; `lifecycle.py` makes one for each model that `repository.py` finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from server.engine import BatchReport, Engine, Message
from server.model_runner import ModelRunner
from server.slots import SlotPool
from server.spec import StepModel


@dataclass(frozen=True)
class SessionLimits:
    """What sessions of one model may take."""

    max_sessions: int
    max_pending_messages: int
    retry_window_steps: int
    idle_limit_s: float | None = None


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
        self.num_sessions = 0
        self.num_pending = 0
        self._calls: dict[Message, Callable[[Message], None]] = {}
        self._loop = loop
        self.engine = Engine(runner, self._hand_back, on_batch)

    def submit(self, message: Message, on_ended: Callable[[Message], None]) -> None:
        """Run a message; `on_ended` is called in the event loop when it has ended."""
        self._calls[message] = on_ended
        self.engine.submit(message)

    def withdraw(self, message: Message) -> bool:
        """Take a message back that has not begun; says whether it is out."""
        if not self.engine.withdraw(message):
            return False
        del self._calls[message]
        return True

    def _hand_back(self, messages: list[Message]) -> None:
        self._loop.call_soon_threadsafe(self._end, messages)

    def _end(self, messages: list[Message]) -> None:
        for message in messages:
            self._calls.pop(message)(message)
