"""Observer: who is told how long a store takes, and which sessions it brings from other replicas.

`metrics.py` is one. What runs without metrics is told to nobody.
"""

from __future__ import annotations

from typing import Literal, Protocol

Operation = Literal[
    "claim",
    "look",
    "find_request",
    "page",
    "count",
    "find_idle",
    "time_of_ended",
    "purge",
    "release",
    "ask_for",
]
"""What a store is asked for beside commits, by the names of `Store`."""

Cause = Literal["asked", "dead"]
"""How a session came from another replica: it gave it on request, or its lease had run out."""


class StoreObserver(Protocol):
    """Told of what a store does, in whichever thread does it."""

    def observe_commit(self, num_writes: int, seconds: float) -> None:
        """A commit of so many sessions' changes has ended, well or not."""

    def observe_store_read(self, operation: Operation, seconds: float) -> None:
        """Another operation has ended, well or not."""

    def count_take_over(self, cause: Cause) -> None:
        """A session of another replica is this one's now."""


class _Nobody:
    def observe_commit(self, num_writes: int, seconds: float) -> None:
        """Nothing is counted."""

    def observe_store_read(self, operation: Operation, seconds: float) -> None:
        """Nothing is counted."""

    def count_take_over(self, cause: Cause) -> None:
        """Nothing is counted."""


UNOBSERVED: StoreObserver = _Nobody()
