"""No store: sessions live as long as the process, and only what must be known of each is kept here.

Records and snapshots are dropped, so every call is a few dictionary look-ups and may be made from the event loop.
"""

from __future__ import annotations

import bisect
import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from server.errors import StoreError
from server.storage.interface import (
    FIRST_FENCE,
    NEW,
    Beat,
    Claim,
    Durability,
    Entry,
    EntryExists,
    Fenced,
    OwnedElsewhere,
    Refusal,
    RequestExists,
    Write,
    new_replica_id,
)

_MOST_ENDED = 20_000
"""Ended sessions whose ids are kept free, under a kilobyte each. The oldest are forgotten before their time."""


class _Session:
    """An entry whose counters change in place, and the fence under which it is owned; None where nobody does."""

    __slots__ = ("entry", "fence", "last_use_s", "next_step")

    def __init__(self, entry: Entry, write: Write) -> None:
        self.entry = entry
        self.next_step = write.next_step
        self.last_use_s = write.last_use_s
        self.fence = None if write.releases else FIRST_FENCE

    def current(self) -> Entry:
        return replace(self.entry, next_step=self.next_step, last_use_s=self.last_use_s)


class MemoryStore:
    """Keeps the entries of this process's sessions."""

    kind: str = "none"
    durability: Durability = Durability.VOLATILE
    keeps_steps: bool = False
    is_shared: bool = False

    def __init__(self) -> None:
        self.replica_id: str = new_replica_id()
        self._sessions: dict[str, _Session] = {}
        self._requests: dict[str, _Session] = {}
        self._ended: deque[tuple[str, _Session]] = deque()
        """Those that have ended, in order of time."""
        self._living: list[str] = []  # ids in order; to insert one among 100k moves under a megabyte
        self._last_fence = FIRST_FENCE
        self._opened_s = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def commit(self, writes: Sequence[Write]) -> list[Refusal | StoreError | None]:
        """See Store.commit."""
        with self._lock:
            return [self._create(write) if write.fence == NEW else self._change(write) for write in writes]

    def _create(self, write: Write) -> EntryExists | RequestExists | None:
        entry = write.entry
        assert entry is not None, "a new session comes with its entry"
        if known := self._requests.get(entry.request_id):
            return RequestExists(known.current())
        if known := self._sessions.get(write.session_id):
            return EntryExists(known.current())
        session = self._sessions[write.session_id] = _Session(entry, write)
        bisect.insort(self._living, write.session_id)
        if entry.request_id:
            self._requests[entry.request_id] = session
        return None

    def _change(self, write: Write) -> Fenced | None:
        session = self._sessions.get(write.session_id)
        if session is None or session.fence != write.fence:
            return Fenced()
        session.next_step = write.next_step
        session.last_use_s = write.last_use_s
        if write.releases:
            session.fence = None
        if write.entry is not None:
            session.entry = write.entry
            if write.entry.end_time_s is not None:
                session.entry = replace(write.entry, end_time_s=time.time())
                session.fence = None
                self._ended.append((write.session_id, session))
                if len(self._ended) > _MOST_ENDED:
                    self._forget(*self._ended.popleft())
                del self._living[bisect.bisect_left(self._living, write.session_id)]
        return None

    def claim(self, session_ids: Sequence[str]) -> list[Claim | OwnedElsewhere | Entry | None]:
        """See Store.claim."""
        with self._lock:
            return [self._claim(session_id) for session_id in session_ids]

    def _claim(self, session_id: str) -> Claim | Entry | None:
        session = self._sessions.get(session_id)
        if session is None:
            return None
        if session.entry.end_time_s is not None:
            return session.current()
        self._last_fence += 1
        session.fence = self._last_fence
        return Claim(session.current(), session.fence, snapshot=b"", records=[])

    def look(self, session_id: str) -> Entry | None:
        """See Store.look."""
        with self._lock:
            session = self._sessions.get(session_id)
            return None if session is None else session.current()

    def find_request(self, request_id: str) -> Entry | None:
        """See Store.find_request."""
        with self._lock:
            session = self._requests.get(request_id)
            return None if session is None else session.current()

    def page(self, after: str, size: int, model_name: str) -> list[Entry]:
        """See Store.page."""
        entries: list[Entry] = []
        with self._lock:
            for session_id in self._living[bisect.bisect_right(self._living, after) :]:
                if len(entries) == size:
                    break
                session = self._sessions[session_id]
                if model_name in ("", session.entry.model_name):
                    entries.append(session.current())
        return entries

    def count(self, first: str, before: str, model_name: str) -> int:
        """See Store.count."""
        with self._lock:
            start = bisect.bisect_left(self._living, first)
            end = bisect.bisect_left(self._living, before)
            if not model_name:
                return end - start
            return sum(self._sessions[i].entry.model_name == model_name for i in self._living[start:end])

    def find_idle(self, last_use_before_s: float, size: int) -> list[str]:
        """See Store.find_idle."""
        with self._lock:
            idle = [
                (session.last_use_s, session_id)
                for session_id in self._living
                if (session := self._sessions[session_id]).last_use_s < last_use_before_s
            ]
        return [session_id for _, session_id in heapq.nsmallest(size, idle)]

    def time_of_ended(self, number: int) -> float:
        """See Store.time_of_ended."""
        with self._lock:
            if number >= len(self._ended):
                return -math.inf
            return self._ended[-1 - number][1].entry.end_time_s or -math.inf

    def purge(self, ended_before_s: float) -> int:
        """See Store.purge."""
        with self._lock:
            num_purged = 0
            while self._ended and (self._ended[0][1].entry.end_time_s or 0.0) < ended_before_s:
                self._forget(*self._ended.popleft())
                num_purged += 1
        return num_purged

    def _forget(self, session_id: str, session: _Session) -> None:
        del self._sessions[session_id]
        if session.entry.request_id:
            del self._requests[session.entry.request_id]

    def beat(self) -> Beat:
        """See Store.beat."""
        return Beat(time.monotonic() - self._opened_s, time.time(), lease_valid_until_s=float("inf"))

    def release(self, session_id: str) -> None:
        """See Store.release."""
        with self._lock:
            if session := self._sessions.get(session_id):
                session.fence = None

    def ask_for(self, session_id: str, owner: str) -> None:
        """See Store.ask_for: there is nobody to ask."""

    def asked_for(self, timeout_s: float) -> list[str]:
        """See Store.asked_for: nobody asks."""
        self._closed.wait(timeout_s)
        return []

    def close(self) -> None:
        """See Store.close."""
        self._closed.set()
