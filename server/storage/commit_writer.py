"""CommitWriter: the store, from the event loop. What is committed here is what the server may answer.

A thread writes: all changes that came while it was busy go into one commit. Others read, keep this replica's lease, and
listen for other replicas that ask for sessions. `sessions.py` decides what is written; `server/storage` how it is kept.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, perf_counter
from typing import TypeVar

import structlog

from server.errors import LeaseLapsedError, ServingError, StoreError, StoreUnavailableError
from server.storage.interface import Beat, Claim, Entry, OwnedElsewhere, Refusal, Store, Write

log = structlog.get_logger()

T = TypeVar("T")

Outcome = Refusal | StoreError | None
"""What became of a write: None, or why it was not made."""

_NUM_READERS = 4


class CommitWriter:
    """Commits in order and in groups, reads on the side, and keeps the lease. Made and used in the event loop."""

    def __init__(
        self,
        store: Store,
        open_store: Callable[[], Store],
        beat_interval_s: float,
        on_commit: Callable[[int, float], None] = lambda _num_writes, _seconds: None,
    ) -> None:
        """Begin to keep a store.

        Args:
            store: just opened.
            open_store: opens it again when the lease has run out.
            beat_interval_s: seconds between heartbeats.
            on_commit: called in the writer's thread after each commit, with its size and how long it took.

        Raises:
            StoreError.
        """
        self.store = store
        self._open_store = open_store
        self._beat_interval_s = beat_interval_s
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._on_lapse: Callable[[], None] = lambda: None
        self._on_asked: Callable[[list[str]], None] = lambda _: None
        self._beat = self.store.beat()
        self._beat_at_s = monotonic()
        self._outbox: list[tuple[Sequence[Write], Callable[[list[Outcome]], None]]] = []
        self._queue: list[tuple[Sequence[Write], Callable[[list[Outcome]], None]]] = []
        self._wake = threading.Condition()
        self._closing = threading.Event()
        self._readers = ThreadPoolExecutor(_NUM_READERS, "store reader")
        self._threads = [threading.Thread(target=self._keep_beating, name="store heartbeat", daemon=True)]
        if self.store.keeps_steps:
            self._threads.append(
                threading.Thread(target=self._keep_writing, name="store writer", daemon=True)
            )
        if self.store.is_shared:
            self._threads.append(
                threading.Thread(target=self._keep_listening, name="store asks", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def watch(self, on_lapse: Callable[[], None], on_asked: Callable[[list[str]], None]) -> None:
        """Have the event loop told when the lease has run out, and of sessions that other replicas ask for."""
        self._on_lapse, self._on_asked = on_lapse, on_asked

    @property
    def service_time_s(self) -> float:
        """The store's service time now."""
        return self._beat.service_time_s + min(monotonic() - self._beat_at_s, 2 * self._beat_interval_s)

    @property
    def time_s(self) -> float:
        """Seconds since the epoch, by the store's clock."""
        return self._beat.time_s + monotonic() - self._beat_at_s

    @property
    def holds_lease(self) -> bool:
        """Whether what this replica knows of its sessions is how they are."""
        return monotonic() < self._beat.lease_valid_until_s

    def commit(self, writes: Sequence[Write], then: Callable[[list[Outcome]], None]) -> None:
        """Make writes durable; `then` is called in the event loop with what became of each.

        Writes of one turn of the event loop are committed together, and of one session in order. A store that is only
        memory is written at once.
        """
        if not self.store.keeps_steps:
            self._loop.call_soon(then, self.store.commit(writes))
            return
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append((writes, then))

    async def committed(self, write: Write) -> Outcome:
        """As `commit`, for one write that somebody waits for."""
        future: asyncio.Future[Outcome] = self._loop.create_future()

        def then(outcomes: list[Outcome]) -> None:
            if not future.done():
                future.set_result(outcomes[0])

        self.commit([write], then)
        return await future

    async def claim(self, session_ids: Sequence[str]) -> list[Claim | OwnedElsewhere | Entry | None]:
        """As `Store.claim`."""
        return await self._read(lambda: self.store.claim(session_ids))

    async def look(self, session_id: str) -> Entry | None:
        """As `Store.look`."""
        return await self._read(lambda: self.store.look(session_id))

    async def find_request(self, request_id: str) -> Entry | None:
        """As `Store.find_request`."""
        return await self._read(lambda: self.store.find_request(request_id))

    async def page(self, after: str, size: int, model_name: str) -> list[Entry]:
        """As `Store.page`."""
        return await self._read(lambda: self.store.page(after, size, model_name))

    async def count(self, first: str, before: str, model_name: str) -> int:
        """As `Store.count`."""
        return await self._read(lambda: self.store.count(first, before, model_name))

    async def find_idle(self, last_use_before_s: float, size: int) -> list[str]:
        """As `Store.find_idle`."""
        return await self._read(lambda: self.store.find_idle(last_use_before_s, size))

    async def purge(self, ended_before_s: float) -> int:
        """As `Store.purge`."""
        return await self._read(lambda: self.store.purge(ended_before_s))

    async def release(self, session_id: str) -> None:
        """As `Store.release`."""
        await self._read(lambda: self.store.release(session_id))

    async def ask_for(self, session_id: str, owner: str) -> None:
        """As `Store.ask_for`."""
        await self._read(lambda: self.store.ask_for(session_id, owner))

    def close(self) -> None:
        """Write what is in line, end the lease, and disconnect. Blocks."""
        self._flush()
        with self._wake:
            self._closing.set()
            self._wake.notify()
        for thread in self._threads:
            thread.join()
        self._readers.shutdown()
        try:
            self.store.close()
        except StoreError as error:
            log.warning("the session store could not be closed in good order", error=str(error))

    async def _read(self, read: Callable[[], T]) -> T:
        if not self.store.keeps_steps:
            return read()

        def read_in_turn() -> T:
            # Those in line behind a store that stalls are not to wait for it one after another.
            if not self.holds_lease:
                raise LeaseLapsedError
            return read()

        return await self._loop.run_in_executor(self._readers, read_in_turn)

    def _flush(self) -> None:
        if self._outbox:
            with self._wake:
                self._queue += self._outbox
                self._wake.notify()
            self._outbox = []

    def _keep_writing(self) -> None:
        while True:
            with self._wake:
                while not self._queue:
                    if self._closing.is_set():
                        return
                    self._wake.wait()
                queue, self._queue = self._queue, []
            writes = [write for some, _ in queue for write in some]
            start_s = perf_counter()
            outcomes: list[Outcome]
            try:
                outcomes = self.store.commit(writes)
            except StoreError as error:
                log.error("a commit failed", num_writes=len(writes), error=str(error))
                outcomes = [error] * len(writes)
            except Exception as error:
                log.error("a commit failed unexpectedly", num_writes=len(writes), exc_info=error)
                outcomes = [StoreUnavailableError()] * len(writes)
            self._on_commit(len(writes), perf_counter() - start_s)
            self._loop.call_soon_threadsafe(self._tell, queue, outcomes)

    @staticmethod
    def _tell(
        queue: list[tuple[Sequence[Write], Callable[[list[Outcome]], None]]], outcomes: list[Outcome]
    ) -> None:
        first = 0
        for writes, then in queue:
            then(outcomes[first : first + len(writes)])
            first += len(writes)

    def _keep_beating(self) -> None:
        while not self._closing.wait(self._beat_interval_s):
            try:
                self._set_beat(self.store.beat())
            except LeaseLapsedError:
                log.error("this replica's lease has run out; its sessions are left to others")
                self._reopen()
            except ServingError as error:
                log.warning("the session store did not take a heartbeat", error=str(error))

    def _reopen(self) -> None:
        """Come back as another replica: what this one knew of its sessions may be out of date."""
        old, has_come_back = self.store, threading.Event()
        try:
            store = self._open_store()
            try:
                beat = store.beat()
            except ServingError:
                store.close()
                raise
        except ServingError as error:
            log.warning("the session store cannot be opened again", error=str(error))
            return

        def come_back() -> None:
            # The lease is valid again only when nothing is left that was known under the old one.
            self.store = store
            self._on_lapse()
            self._set_beat(beat)
            has_come_back.set()

        self._loop.call_soon_threadsafe(come_back)
        while not has_come_back.wait(self._beat_interval_s) and not self._closing.is_set():
            pass
        try:
            old.close()
        except StoreError as error:
            log.warning("the session store could not be closed in good order", error=str(error))

    def _set_beat(self, beat: Beat) -> None:
        self._beat_at_s = monotonic()
        self._beat = beat

    def _keep_listening(self) -> None:
        while not self._closing.is_set():
            try:
                asked = self.store.asked_for(timeout_s=0.5)
            except ServingError as error:
                log.warning("other replicas cannot be heard", error=str(error))
                self._closing.wait(0.5)
                continue
            if asked:
                self._loop.call_soon_threadsafe(self._on_asked, asked)
