"""Run limit: a run on the device that takes too long is ended, so that a model that does not return holds nobody up.

`engine.py` says when a run begins and ends, and what becomes of its requests; the runner knows how to end one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

import structlog

log = structlog.get_logger()

_LOOKS_PER_LIMIT = 8


class RunLimit:
    """Looks at one engine's runs from a thread of its own."""

    def __init__(self, model: str, limit_s: float, interrupt: Callable[[], None]) -> None:
        """Start looking.

        Args:
            model: whose runs.
            limit_s: seconds that a run may take, and up to an eighth more.
            interrupt: ends the run in progress; called in the looking thread.
        """
        self._model = model
        self._limit_s = limit_s
        self._interrupt = interrupt
        self._began_s: float | None = None
        self.was_reached = False
        """Whether the run in progress was told to end."""
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name=f"run limit {model}", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """A run begins."""
        self._began_s = perf_counter()

    def end(self) -> bool:
        """It has ended; says whether it was told to."""
        with self._lock:
            self._began_s = None
            was_reached, self.was_reached = self.was_reached, False
        return was_reached

    def close(self) -> None:
        """Look no more."""
        self._is_closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_closed.wait(self._limit_s / _LOOKS_PER_LIMIT):
            with self._lock:
                is_over = self._began_s is not None and perf_counter() - self._began_s > self._limit_s
                if not is_over or self.was_reached:
                    continue
                self.was_reached = True
                self._interrupt()
            log.error("a run takes too long and is ended", model=self._model, limit_s=self._limit_s)
