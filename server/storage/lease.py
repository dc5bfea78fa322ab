"""Lease: this replica's right to its sessions, and the requests of other replicas for them.

A thread renews the lease; another listens for replicas that ask for sessions. When the lease has run out the store is
opened anew, since others may have taken the sessions over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import monotonic

import structlog

from server.errors import LeaseLapsedError, ServingError, StoreError
from server.storage.interface import Beat, Store

log = structlog.get_logger()


class LeaseRenewer:
    """Renews a store's lease, and opens the store again when it has run out. Made and used in the event loop."""

    def __init__(self, store: Store, open_store: Callable[[], Store], beat_interval_s: float) -> None:
        """Begin to keep the lease.

        Args:
            store: just opened.
            open_store: opens it again when the lease has run out.
            beat_interval_s: seconds between heartbeats.

        Raises:
            StoreError.
        """
        self.store = store
        self._open_store = open_store
        self._beat_interval_s = beat_interval_s
        self._loop = asyncio.get_running_loop()
        self._on_lapse: Callable[[], None] = lambda: None
        self._on_asked: Callable[[list[str]], None] = lambda _: None
        self.last_beat = self.store.beat()
        self._beat_at_s = monotonic()
        self._closing = threading.Event()
        self.threads = [threading.Thread(target=self._keep_beating, name="store heartbeat", daemon=True)]
        if self.store.is_shared:
            self.threads.append(threading.Thread(target=self._keep_listening, name="store asks", daemon=True))
        """Those that renew and listen."""
        for thread in self.threads:
            thread.start()

    def watch(self, on_lapse: Callable[[], None], on_asked: Callable[[list[str]], None]) -> None:
        """Have the event loop told when the lease has run out, and of sessions that other replicas ask for."""
        self._on_lapse, self._on_asked = on_lapse, on_asked

    @property
    def service_time_s(self) -> float:
        """The store's service time now."""
        return self.last_beat.service_time_s + min(monotonic() - self._beat_at_s, 2 * self._beat_interval_s)

    @property
    def time_s(self) -> float:
        """Seconds since the epoch, by the store's clock."""
        return self.last_beat.time_s + monotonic() - self._beat_at_s

    @property
    def is_held(self) -> bool:
        """Whether what this replica knows of its sessions is how they are."""
        return monotonic() < self.last_beat.lease_valid_until_s

    def lapse(self) -> None:
        """Other replicas may have taken sessions over: whoever watches is told."""
        self._on_lapse()

    def stop(self) -> None:
        """Renew it no more. Blocks."""
        self._closing.set()
        for thread in self.threads:
            thread.join()

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
        self.last_beat = beat

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
