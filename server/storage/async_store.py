"""Async store: the store as the event loop sees it. What is committed here is what the server may answer.

`commit_writer.py` writes in a thread of its own, others read, and `lease.py` keeps this replica's lease.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TypeVar

import structlog

from server.errors import LeaseLapsedError, StoreError
from server.storage.commit_writer import CommitWriter, Outcome
from server.storage.interface import Claim, Entry, OwnedElsewhere, Store, Write
from server.storage.lease import LeaseRenewer
from server.storage.observer import UNOBSERVED, Operation, StoreObserver

log = structlog.get_logger()

T = TypeVar("T")

_NUM_READERS = 4


class AsyncStore:
    """A store's methods as coroutines. Made and used in the event loop."""

    def __init__(
        self,
        store: Store,
        open_store: Callable[[], Store],
        beat_interval_s: float,
        observer: StoreObserver = UNOBSERVED,
    ) -> None:
        """Begin to keep a store.

        Args:
            store: just opened.
            open_store: opens it again when the lease has run out.
            beat_interval_s: seconds between heartbeats.
            observer: told how long the store takes; of a store that is only memory it is told nothing.

        Raises:
            StoreError.
        """
        self.lease = LeaseRenewer(store, open_store, beat_interval_s)
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._readers = ThreadPoolExecutor(_NUM_READERS, "store reader")
        self._writer = CommitWriter(lambda: self.backend, observer) if store.keeps_steps else None

    @property
    def backend(self) -> Store:
        """The store itself; another one after a lease has run out."""
        return self.lease.store

    @property
    def threads(self) -> list[threading.Thread]:
        """Those that must not end before `close`."""
        return [*self.lease.threads, *([] if self._writer is None else [self._writer.thread])]

    @property
    def service_time_s(self) -> float:
        """The store's service time now."""
        return self.lease.service_time_s

    @property
    def time_s(self) -> float:
        """Seconds since the epoch, by the store's clock."""
        return self.lease.time_s

    @property
    def holds_lease(self) -> bool:
        """Whether what this replica knows of its sessions is how they are."""
        return self.lease.is_held

    async def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        """Make writes durable; gives what became of each.

        Writes of one turn of the event loop are committed together, and of one session in order. A store that is only
        memory is written at once.
        """
        if self._writer is None:
            return [*self.backend.commit(writes)]
        return await self._writer.commit(writes)

    async def commit_one(self, write: Write) -> Outcome:
        """As `commit`."""
        (outcome,) = await self.commit([write])
        return outcome

    async def claim(self, session_ids: Sequence[str]) -> list[Claim | OwnedElsewhere | Entry | None]:
        """As `Store.claim`."""
        found = await self._read("claim", lambda: self.backend.claim(session_ids))
        for each in found:
            if isinstance(each, Claim) and each.is_from_dead:
                self._observer.count_take_over("dead")
        return found

    def note_hand_over(self) -> None:
        """A session was claimed that another replica has given this one on request."""
        self._observer.count_take_over("asked")

    async def look(self, session_id: str) -> Entry | None:
        """As `Store.look`."""
        return await self._read("look", lambda: self.backend.look(session_id))

    async def find_request(self, request_id: str) -> Entry | None:
        """As `Store.find_request`."""
        return await self._read("find_request", lambda: self.backend.find_request(request_id))

    async def page(self, after: str, size: int, model_name: str) -> list[Entry]:
        """As `Store.page`."""
        return await self._read("page", lambda: self.backend.page(after, size, model_name))

    async def count(self, first: str, before: str, model_name: str) -> int:
        """As `Store.count`."""
        return await self._read("count", lambda: self.backend.count(first, before, model_name))

    async def find_idle(self, last_use_before_s: float, size: int) -> list[str]:
        """As `Store.find_idle`."""
        return await self._read("find_idle", lambda: self.backend.find_idle(last_use_before_s, size))

    async def time_of_ended(self, number: int) -> float:
        """As `Store.time_of_ended`."""
        return await self._read("time_of_ended", lambda: self.backend.time_of_ended(number))

    async def purge(self, ended_before_s: float) -> int:
        """As `Store.purge`."""
        return await self._read("purge", lambda: self.backend.purge(ended_before_s))

    async def release(self, session_id: str) -> None:
        """As `Store.release`."""
        await self._read("release", lambda: self.backend.release(session_id))

    async def ask_for(self, session_id: str, owner: str) -> None:
        """As `Store.ask_for`."""
        await self._read("ask_for", lambda: self.backend.ask_for(session_id, owner))

    def close(self) -> None:
        """Write what is queued, end the lease, and disconnect. Blocks."""
        if self._writer is not None:
            self._writer.close()
        self.lease.stop()
        self._readers.shutdown()
        try:
            self.backend.close()
        except StoreError as error:
            log.warning("the session store could not be closed in good order", error=str(error))

    async def _read(self, operation: Operation, read: Callable[[], T]) -> T:
        if self._writer is None:
            return read()

        def read_in_turn() -> T:
            # Those queued behind a store that stalls are not to wait for it one after another.
            if not self.holds_lease:
                raise LeaseLapsedError
            start_s = perf_counter()
            try:
                return read()
            finally:
                self._observer.observe_store_read(operation, perf_counter() - start_s)

        return await self._loop.run_in_executor(self._readers, read_in_turn)
