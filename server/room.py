"""Room: how many sessions of one model are in memory, and which of them can make room for another.

It counts places and knows who is idle; `residence.py` brings sessions in and out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Generic, TypeVar

S = TypeVar("S")


class Room(Generic[S]):
    """Places for sessions, and the idle ones in order of their last use."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._num_leaving = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle: OrderedDict[S, None] = OrderedDict()
        self.num_taken = 0

    @property
    def num_waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a place, nor waits for one."""
        return not self.num_taken and not self._waiting

    @property
    def idle(self) -> list[S]:
        """Sessions that no call uses, the longest unused first."""
        return list(self._idle)

    def take(self) -> bool:
        """Take a place if one is free and nobody waits for it."""
        if self.num_taken >= self._num_places:
            return False
        self.num_taken += 1
        return True

    def line_up(self) -> asyncio.Future[None]:
        """Wait for a place that another gives up: it is taken when this is done."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        return place

    def give_up(self) -> None:
        """Give a place up, to whoever waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.num_taken -= 1

    def rest(self, sessions: Iterable[S]) -> None:
        """No call uses these sessions any more."""
        idle = self._idle
        for session in sessions:
            idle[session] = None
            idle.move_to_end(session)

    def wake(self, sessions: Iterable[S]) -> None:
        """These sessions are used, or gone."""
        leave = self._idle.pop
        for session in sessions:
            leave(session, None)

    def next_to_leave(self) -> S | None:
        """The session that is to make room for one that waits; None if nobody can, or enough are leaving already."""
        if self._idle and len(self._waiting) > self._num_leaving:
            return next(iter(self._idle))
        return None

    def begins_to_leave(self) -> None:
        """A session is on its way out."""
        self._num_leaving += 1

    def has_left(self) -> None:
        """A session that was on its way out has left, or stays after all."""
        self._num_leaving -= 1
