"""Scheduler: who runs next. Continuous batching with fair turns, and no tensors.

Whenever the device is free it takes waiting requests, as many as fit into the batch, with about as many turns left
each, since a run of several turns is cut short by whoever has the fewest. Those with the fewest go first, though not
twice in a row ahead of whoever has waited longest. After as many turns as fit into a short quantum of time, requests
with turns left go to the end of their queue, so a long request never holds up a short one. `engine.py` runs what this
decides.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler knows of a request."""

    is_started: bool
    """Its first turn was taken: it runs to its end."""
    num_rows: int
    """How many rows of a batch it takes, at most a batch of them."""
    num_left: int
    """Turns it still needs."""


R = TypeVar("R", bound=Schedulable)


class Scheduler(Generic[R]):
    """Queues of requests, each of other sessions (a session has at most one here)."""

    def __init__(self, max_batch_size: int, most_turns: int = 1) -> None:
        """Nobody waits.

        Args:
            max_batch_size: rows of the largest batch.
            most_turns: a run has at most so many, a power of two. Requests with as many left or more are alike, and
                below that those whose number has the same highest bit.
        """
        self._max_batch_size = max_batch_size
        self._most_turns = most_turns
        # Each in order of arrival, with numbers that tell the order of all.
        self._queues: list[dict[R, int]] = [{} for _ in range(most_turns.bit_length() + 1)]
        self._is_ahead = False
        """The last batch was of few turns, and went ahead of those who had waited longest."""
        self._num_added = 0
        self._num_waiting = 0

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return self._num_waiting > 0

    def enqueue(self, request: R) -> None:
        """Put a request at the end of its queue."""
        self._num_added += 1
        self._num_waiting += 1
        self._queue_of(request)[request] = self._num_added

    def cancel(self, request: R) -> bool:
        """Take a request out again, unless its first turn was taken; says whether it is out."""
        if request.is_started:
            return False
        del self._queue_of(request)[request]
        self._num_waiting -= 1
        return True

    def next_batch(self) -> list[R]:
        """Take the requests whose turn it is out of their queue; empty when nobody waits."""
        queues = [queue for queue in self._queues if queue]
        if not queues:
            return []
        oldest = queues[0] if len(queues) == 1 else min(queues, key=lambda queue: next(iter(queue.values())))
        queue = oldest if self._is_ahead else queues[0]
        self._is_ahead = queue is not oldest
        num_free = self._max_batch_size
        batch = list[R]()
        for request in queue:
            if request.num_rows > num_free:
                break
            num_free -= request.num_rows
            request.is_started = True
            batch.append(request)
        for request in batch:
            del queue[request]
        self._num_waiting -= len(batch)
        return batch

    def _queue_of(self, request: R) -> dict[R, int]:
        return self._queues[min(request.num_left, self._most_turns).bit_length()]
