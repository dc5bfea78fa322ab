"""Watching: what happens in a session, told to whoever watches it.

A message that was committed is offered to each watcher of its session. A watcher has room for some messages; what comes
while it is full is lost to it, and it is told how many. So it holds nobody up, and where nobody has room, no state is
read. While nobody watches, a message costs a look at an empty dictionary.

`executor.py` offers, `rpc/watching.py` sends.

Shapes: T steps of a message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ntm.tensor import Array
from server.errors import ServingError
from server.model.layout import Steps

MOST_FRAMES = 32
MOST_FRAME_BYTES = 8 * 2**20
"""What may wait for one watcher; a message always fits when nothing else waits."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of a session, after its commit; or, without steps, a reset."""

    first_step: int
    inputs: Steps | None
    """[T]; None for a reset."""
    outputs: Steps | None
    """[T]; None for a reset."""
    next_step: int
    state: Mapping[str, Array]
    """After the last step, by name, [...state shape] each in the graph's axes; empty if nobody asked for it."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, about."""
        arrays: list[Array] = [*self.state.values()]
        arrays += [steps for steps in (self.inputs, self.outputs) if steps is not None]
        return sum(array.nbytes for array in arrays)


class Watcher:
    """One watcher of one session."""

    def __init__(self, wants_state: bool) -> None:
        """It wants the state after each message, or inputs and outputs alone."""
        self.wants_state = wants_state
        self._frames: deque[tuple[Frame, int]] = deque()
        """With each, how many were lost before it."""
        self._num_bytes = 0
        self._num_lost = 0
        self._end: ServingError | None = None
        self._arrived = asyncio.Event()

    @property
    def has_room(self) -> bool:
        """Whether one more message would not be lost."""
        return not self._frames or (len(self._frames) < MOST_FRAMES and self._num_bytes < MOST_FRAME_BYTES)

    def offer(self, frame: Frame) -> None:
        """Take a message, or lose it."""
        if not self.has_room or (self.wants_state and frame.inputs is not None and not frame.state):
            self._num_lost += 1
            return
        self._frames.append((frame, self._num_lost))
        self._num_bytes += frame.num_bytes
        self._num_lost = 0
        self._arrived.set()

    def end(self, reason: ServingError) -> None:
        """There will be no more."""
        self._end = reason
        self._arrived.set()

    async def next(self) -> tuple[Frame, int]:
        """The next message, and how many were lost just before it.

        Raises:
            ServingError: why there are no more, after all that were taken.
        """
        while not self._frames:
            if self._end is not None:
                raise self._end
            self._arrived.clear()
            await self._arrived.wait()
        frame, num_lost = self._frames.popleft()
        self._num_bytes -= frame.num_bytes
        return frame, num_lost


class Watching:
    """All watchers, by the session that they watch."""

    def __init__(self) -> None:
        """Nobody watches."""
        self.of: dict[str, list[Watcher]] = {}
        """By session id, never an empty list: empty as a whole while nobody watches."""

    @contextmanager
    def watch(self, session_id: str, wants_state: bool) -> Iterator[Watcher]:
        """Watch a session for the length of a `with` block."""
        watcher = Watcher(wants_state)
        self.of.setdefault(session_id, []).append(watcher)
        try:
            yield watcher
        finally:
            left = [other for other in self.of.get(session_id, ()) if other is not watcher]
            if left:
                self.of[session_id] = left
            else:
                self.of.pop(session_id, None)

    def want_state(self, session_id: str) -> bool:
        """Whether the state after a session's next message is to be read for somebody who has room for it."""
        return any(watcher.wants_state and watcher.has_room for watcher in self.of.get(session_id, ()))

    def offer(self, session_id: str, frame: Frame) -> None:
        """Tell a session's watchers of a message."""
        for watcher in self.of.get(session_id, ()):
            watcher.offer(frame)

    def end(self, session_id: str, reason: ServingError) -> None:
        """A session is here no more: tell its watchers why."""
        for watcher in self.of.get(session_id, ()):
            watcher.end(reason)
