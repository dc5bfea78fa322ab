"""Session table: what the server knows of all sessions of one model that are in memory, in columns.

A batch has a hundred sessions, each with an object of its own somewhere in memory. So whatever every batch asks and
tells of all its sessions stands here, at the index that each has in its model's table, and takes one operation for
all. `session.py` shows one session's as its own. The table also says which index is free, and who is to be evicted
first.

Shapes: S sessions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from server.model.spec import StepModel
from server.runtime.columns import Column
from server.runtime.runner import INITIAL_SLOT, Rows
from server.sessions.retry_window import RetryWindows

if TYPE_CHECKING:
    from server.sessions.request import Entry
    from server.sessions.session import Session

# How many of the longest idle are sought at once: so many are evicted before all are looked through again.
_NUM_SOUGHT = 256


class SessionTable:
    """The sessions of one model."""

    def __init__(self, num_sessions: int, model: StepModel, retry_window_steps: int) -> None:
        """All indices are free.

        Args:
            num_sessions: how many there can be.
            model: theirs.
            retry_window_steps: steps of each for which answers are kept.
        """
        self._num_sessions = num_sessions
        self._free = [*range(num_sessions)][::-1]
        self._num_leaving = 0
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._next_to_evict: list[tuple[int, float]] = []
        self.no_index = num_sessions
        """What no session has, but can be asked as one: of a session that has left."""
        num_rows = num_sessions + 1
        self.session: list[Session | None] = [None] * num_rows
        self.retry_windows = RetryWindows(
            num_rows, model.inputs.dtype, model.outputs.dtype, retry_window_steps
        )
        self.next_step = self.retry_windows.next_step
        """The session's counter: it only grows."""
        self.slot = Column(num_rows, INITIAL_SLOT)
        """Where its state is."""
        self.initial_slot = Column(num_rows, INITIAL_SLOT)
        """Where the state is that it began from and a reset returns to."""
        self.head: list[Entry | None] = [None] * num_rows
        """The first entry of its queue: what is being done, or is next."""
        self.needs_attention = Column(num_rows, False)
        """Whether entries wait behind the first, or it is lost: when the first is done, there is more to do."""
        self.is_idle = Column(num_rows, False)
        """Whether its queue is empty, so that it may be evicted."""
        self.last_use_s = Column(num_rows, 0.0)
        """Service time of its last call."""
        self.snapshot_step = Column(num_rows, 0)
        """Its snapshot is the state before this step."""
        self.is_approximate = Column(num_rows, False)
        """Whether it was once replayed on another machine or build than it ran on."""
        self.num_lost = 0
        """How many sessions are lost and still have their index."""
        self.num_failed = 0
        """How many have a request that failed on record."""
        self.became_idle = asyncio.Event()
        """Set when a session becomes idle while somebody waits for an index."""

    @property
    def num_taken(self) -> int:
        """How many indices are taken."""
        return self._num_sessions - len(self._free)

    @property
    def num_waiting(self) -> int:
        """How many wait for an index."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether nobody has an index, nor waits for one."""
        return not self.num_taken and not self._waiting

    def take(self) -> int | None:
        """Take an index; None if none is free."""
        return self._free.pop() if self._free else None

    def wait_for_index(self) -> asyncio.Future[int]:
        """Wait for an index that another gives up: it is taken when this is done."""
        index: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(index)
        return index

    def give_up(self, index: int) -> None:
        """Give an index up, to whoever waits longest."""
        self.session[index] = None
        self.slot.one[index] = self.initial_slot.one[index] = INITIAL_SLOT
        self.needs_attention.one[index] = self.is_idle.one[index] = False
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(index)
                self.became_idle.set()
                return
        self._free.append(index)

    def set_idle(self, indices: int | Rows) -> None:
        """The queues of the sessions at some indices, or one, are empty."""
        self.is_idle.each[indices] = True
        if self._waiting:
            self.became_idle.set()

    def idle(self, before_s: float) -> list[Session]:
        """Idle sessions that none has used since a service time; the longest unused first."""
        indices = np.flatnonzero(self.is_idle.each & (self.last_use_s.each <= before_s))
        indices = indices[np.argsort(self.last_use_s.each[indices], kind="stable")]
        return [session for index in indices.tolist() if (session := self.session[index]) is not None]

    def next_to_evict(self) -> Session | None:
        """The longest idle session, if one is to make room; None if none can, or enough are leaving already."""
        if len(self._waiting) <= self._num_leaving:
            return None
        while self._next_to_evict or self._seek_next_to_evict():
            index, last_use_s = self._next_to_evict[-1]
            if self.is_idle.one[index] and self.last_use_s.one[index] == last_use_s:
                return self.session[index]
            self._next_to_evict.pop()
        return None

    def begins_to_leave(self) -> None:
        """A session is on its way out."""
        self._num_leaving += 1

    def has_left(self) -> None:
        """A session that was on its way out has left, or stays after all."""
        self._num_leaving -= 1
        if self._waiting:
            self.became_idle.set()

    def _seek_next_to_evict(self) -> bool:
        """Find the longest idle; says whether there are any."""
        indices = np.flatnonzero(self.is_idle.each)
        uses_s = self.last_use_s.each[indices]
        if len(indices) > _NUM_SOUGHT:
            longest = np.argpartition(uses_s, _NUM_SOUGHT)[:_NUM_SOUGHT]
            indices, uses_s = indices[longest], uses_s[longest]
        order = np.argsort(uses_s, kind="stable")[::-1]
        self._next_to_evict = [*zip(indices[order].tolist(), uses_s[order].tolist(), strict=True)]
        return bool(self._next_to_evict)
