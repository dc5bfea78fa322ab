"""Scheduler: who runs next. Continuous batching with fair turns, and no tensors.

Whenever the device is free it takes waiting messages, as many as fit into the batch, with about as many turns left
each, since a run of several turns is cut short by whoever has the fewest. Those with the fewest go first, though not
twice in a row ahead of whoever has waited longest. After as many turns as fit into a short quantum of time, messages
with turns left go to the end of their line, so a long message never holds up a short one. `engine.py` runs what this
decides.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler knows of a message."""

    is_started: bool
    """Its first turn was taken: it runs to its end."""

    @property
    def num_rows(self) -> int:
        """How many rows of a batch it takes, at most a batch of them."""

    @property
    def num_left(self) -> int:
        """Turns it still needs."""


M = TypeVar("M", bound=Schedulable)


class Scheduler(Generic[M]):
    """Lines of messages, each of other sessions (a session has at most one here)."""

    def __init__(self, max_batch_size: int, most_turns: int = 1, halves_from: int | None = None) -> None:
        """Nobody waits.

        Args:
            max_batch_size: rows of the largest batch.
            most_turns: a run has at most so many, a power of two. Messages with as many left or more are alike, and
                below that those whose number has the same highest bit.
            halves_from: messages with so many turns left run in two batches that take turns, if more than half a batch
                of them come and go: those of one are answered while the other runs. None: all run in one.
        """
        self._max_batch_size = max_batch_size
        self._most_turns = most_turns
        self._halves_from = halves_from
        # Each in order of arrival, with numbers that tell the order of all.
        self._lines: list[dict[M, int]] = [{} for _ in range(most_turns.bit_length() + 1)]
        self._is_ahead = False
        """The last batch was of few turns, and went ahead of those who had waited longest."""
        self._num_added = 0
        self._num_rows_waiting = 0
        self._num_rows_being_answered = 0

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return self._num_rows_waiting > 0

    def add(self, message: M) -> None:
        """Put a message at the end of its line."""
        self._num_added += 1
        self._line_of(message)[message] = self._num_added
        self._num_rows_waiting += message.num_rows

    def withdraw(self, message: M) -> bool:
        """Take a message out again, unless its first turn was taken; says whether it is out."""
        if message.is_started:
            return False
        del self._line_of(message)[message]
        self._num_rows_waiting -= message.num_rows
        return True

    def shrink(self, message: M) -> bool:
        """Let a message in line need a row less, unless its first turn was taken; says whether it does."""
        if message.is_started:
            return False
        self._num_rows_waiting -= 1
        return True

    def next_batch(self) -> list[M]:
        """Take the messages whose turn it is, out of their line; empty when nobody waits."""
        lines = [line for line in self._lines if line]
        if not lines:
            return []
        oldest = lines[0] if len(lines) == 1 else min(lines, key=lambda line: next(iter(line.values())))
        line = oldest if self._is_ahead else lines[0]
        self._is_ahead = line is not oldest
        num_free = most = self._most_rows(next(iter(line)))
        batch = list[M]()
        for message in line:
            num_rows = message.num_rows
            if num_rows > num_free:
                break
            num_free -= num_rows
            message.is_started = True
            batch.append(message)
        for message in batch:
            del line[message]
        self._num_rows_being_answered = most - num_free  # unless they are put back
        self._num_rows_waiting -= most - num_free
        return batch

    def put_back(self, unfinished: list[M]) -> None:
        """Put messages that need more turns at the end of their lines, in the order they ran."""
        for message in unfinished:
            self.add(message)
            self._num_rows_being_answered -= message.num_rows

    def _line_of(self, message: M) -> dict[M, int]:
        return self._lines[min(message.num_left, self._most_turns).bit_length()]

    def _most_rows(self, first: M) -> int:
        """How many rows the batch may have that a message is the first of."""
        if self._halves_from is None or first.num_left < self._halves_from:
            return self._max_batch_size
        # Those who are being answered will be back.
        half = (self._num_rows_waiting + self._num_rows_being_answered + 1) // 2
        return max(first.num_rows, min(self._max_batch_size, max(half, self._max_batch_size // 2)))
