"""Room: the places of one model's sessions in memory, what is asked of many of them at once, and who makes room.

A batch has a hundred sessions, and each of them an object of its own, somewhere in memory. So what every batch asks and
tells of all its sessions stands in columns here and in `history.py`, by place, and takes one operation for all.
`session.py` shows one session's as its own; `residence.py` brings sessions in and out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

import numpy as np

from server.runtime.columns import Column
from server.runtime.runner import INITIAL_SLOT

S = TypeVar("S")
"""A session."""
C = TypeVar("C")
"""What stands in its line."""

# How many of the longest idle are sought at once: so many leave before all are looked through again.
_NUM_SOUGHT = 256


class Room(Generic[S, C]):
    """Places for sessions."""

    def __init__(self, num_places: int) -> None:
        """All places are free."""
        self.nowhere = num_places
        """What is no place but can be asked as one: of a session that has none any more."""
        self._num_places = num_places
        self._free = [*range(num_places)][::-1]
        self._num_leaving = 0
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._next_to_leave: list[tuple[int, float]] = []
        self.session: list[S | None] = [None] * (num_places + 1)
        """Who is in each place."""
        self.slot = Column(num_places + 1, INITIAL_SLOT)
        """Where its state is."""
        self.first_call: list[C | None] = [None] * (num_places + 1)
        """What is being served of the calls in its line, or is next; None if there are none."""
        self.needs_care = Column(num_places + 1, False)
        """Whether calls wait behind the first, or it is lost: when the first has ended, there is more to do."""
        self.is_idle = Column(num_places + 1, False)
        """Whether no call uses it."""
        self.last_use_s = Column(num_places + 1, 0.0)
        """Service time of its last call."""
        self.snapshot_step = Column(num_places + 1, 0)
        """Its snapshot is the state before this step."""
        self.is_approximate = Column(num_places + 1, False)
        """Whether it was once replayed on another machine or build than it ran on."""
        self.num_lost = 0
        """How many sessions are lost and still have their place."""
        self.num_failed = 0
        """How many have a message that failed on record."""

    @property
    def num_taken(self) -> int:
        """How many places are taken."""
        return self._num_places - len(self._free)

    @property
    def num_waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a place, nor waits for one."""
        return not self.num_taken and not self._waiting

    def take(self) -> int | None:
        """Take a place; None if none is free."""
        return self._free.pop() if self._free else None

    def line_up(self) -> asyncio.Future[int]:
        """Wait for a place that another gives up: it is taken when this is done."""
        place: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        return place

    def give_up(self, place: int) -> None:
        """Give a place up, to whoever waits longest."""
        self.session[place] = None
        self.slot.one[place] = INITIAL_SLOT
        self.needs_care.one[place] = self.is_idle.one[place] = False
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(place)
                return
        self._free.append(place)

    def idle(self, before_s: float) -> list[S]:
        """Sessions that no call uses, and none has used since a service time; the longest unused first."""
        places = np.flatnonzero(self.is_idle.each & (self.last_use_s.each <= before_s))
        places = places[np.argsort(self.last_use_s.each[places], kind="stable")]
        return [session for place in places.tolist() if (session := self.session[place]) is not None]

    def next_to_leave(self) -> S | None:
        """The longest idle session, if one is to make room; None if nobody can, or enough are leaving already."""
        if len(self._waiting) <= self._num_leaving:
            return None
        while self._next_to_leave or self._seek_next_to_leave():
            place, last_use_s = self._next_to_leave[-1]
            if self.is_idle.one[place] and self.last_use_s.one[place] == last_use_s:
                return self.session[place]
            self._next_to_leave.pop()
        return None

    def begins_to_leave(self) -> None:
        """A session is on its way out."""
        self._num_leaving += 1

    def has_left(self) -> None:
        """A session that was on its way out has left, or stays after all."""
        self._num_leaving -= 1

    def _seek_next_to_leave(self) -> bool:
        """Find the longest idle; says whether there are any."""
        places = np.flatnonzero(self.is_idle.each)
        uses_s = self.last_use_s.each[places]
        if len(places) > _NUM_SOUGHT:
            longest = np.argpartition(uses_s, _NUM_SOUGHT)[:_NUM_SOUGHT]
            places, uses_s = places[longest], uses_s[longest]
        order = np.argsort(uses_s, kind="stable")[::-1]
        self._next_to_leave = [*zip(places[order].tolist(), uses_s[order].tolist(), strict=True)]
        return bool(self._next_to_leave)
