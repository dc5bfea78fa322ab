"""Scheduler: who runs next. Continuous batching with fair turns, and no tensors.

Whenever the device is free it takes the next waiting messages, in turn, as many as fit into the batch. After a
step, or as many as fit into a short quantum of time, those with steps left go to the end of the line, so a long
message never holds up a short one. `engine.py` runs what this decides.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler knows of a message."""

    is_started: bool
    """Its first turn was taken: it runs to its end."""

    @property
    def num_rows(self) -> int:
        """How many rows of a batch it takes, at most a batch of them."""


M = TypeVar("M", bound=Schedulable)


class Scheduler(Generic[M]):
    """A line of messages, each of other sessions (a session has at most one here)."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._line: deque[M] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, message: M) -> None:
        """Put a message at the end of the line."""
        self._line.append(message)

    def withdraw(self, message: M) -> bool:
        """Take a message out again, unless its first turn was taken; says whether it is out."""
        if message.is_started:
            return False
        self._line.remove(message)
        return True

    def next_batch(self) -> list[M]:
        """Take the messages whose turn it is, out of the line; empty when nobody waits."""
        batch: list[M] = []
        num_free = self._max_batch_size
        while self._line and self._line[0].num_rows <= num_free:
            message = self._line.popleft()
            message.is_started = True
            num_free -= message.num_rows
            batch.append(message)
        return batch

    def put_back(self, unfinished: list[M]) -> None:
        """Put messages that need more turns at the end of the line, in the order they ran."""
        self._line.extend(unfinished)
