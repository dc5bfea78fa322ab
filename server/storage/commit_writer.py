"""Commit writer: a thread that makes writes durable, all that came while it was busy in one commit.

`sessions/` decides what is written, the store how it is kept; `async_store.py` puts it together with the rest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from time import perf_counter

import structlog

from server.errors import StoreError, StoreUnavailableError
from server.storage.interface import Refusal, Store, Write
from server.storage.observer import UNOBSERVED, StoreObserver

log = structlog.get_logger()

Outcome = Refusal | StoreError | None
"""What became of a write: None, or why it was not made."""

_Batch = tuple[Sequence[Write], "asyncio.Future[list[Outcome]]"]


class CommitWriter:
    """Commits in order and in groups. Made and used in the event loop."""

    def __init__(
        self,
        store: Callable[[], Store],
        observer: StoreObserver = UNOBSERVED,
    ) -> None:
        """Start the thread.

        Args:
            store: gives the store to write to, which is another one after a lease has run out.
            observer: told of each commit, in the thread.
        """
        self._store = store
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._gathered: list[_Batch] = []
        """Of this turn of the event loop."""
        self._queue: list[_Batch] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._keep_writing, name="store writer", daemon=True)
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """The one that writes."""
        return self._thread

    @property
    def num_queued(self) -> int:
        """Batches of writes that wait for the thread."""
        return len(self._queue)

    def commit(self, writes: Sequence[Write]) -> asyncio.Future[list[Outcome]]:
        """Make writes durable; the future gives what became of each.

        Writes of one turn of the event loop are committed together, and of one session in order.
        """
        done: asyncio.Future[list[Outcome]] = self._loop.create_future()
        if not self._gathered:
            self._loop.call_soon(self._enqueue)
        self._gathered.append((writes, done))
        return done

    def close(self) -> None:
        """Write what is queued, and end the thread. Blocks."""
        self._enqueue()
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()

    def _enqueue(self) -> None:
        if self._gathered:
            with self._wake:
                self._queue += self._gathered
                self._wake.notify()
            self._gathered = []

    def _keep_writing(self) -> None:
        while True:
            with self._wake:
                while not self._queue:
                    if self._is_closing:
                        return
                    self._wake.wait()
                queue, self._queue = self._queue, []
            writes = [write for batch, _ in queue for write in batch]
            start_s = perf_counter()
            outcomes: list[Outcome]
            try:
                outcomes = self._store().commit(writes)
            except StoreError as error:
                log.error("a commit failed", num_writes=len(writes), error=str(error))
                outcomes = [error] * len(writes)
            except Exception as error:
                log.error("a commit failed unexpectedly", num_writes=len(writes), exc_info=error)
                outcomes = [StoreUnavailableError()] * len(writes)
            self._observer.observe_commit(len(writes), perf_counter() - start_s)
            self._loop.call_soon_threadsafe(self._tell, queue, outcomes)

    @staticmethod
    def _tell(queue: list[_Batch], outcomes: list[Outcome]) -> None:
        first = 0
        for writes, done in queue:
            if not done.done():
                done.set_result(outcomes[first : first + len(writes)])
            first += len(writes)
