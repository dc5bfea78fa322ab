"""The log: lines on standard error that can neither stop the server nor drown it.

A line that cannot be written is lost and counted, whatever the reason: a full disk, a reader that left, no memory.
Tracebacks show no local variables, which hold what callers sent. Of warnings and errors with the same words only some
are written in a while, and the next one says how many were left out; what an auditor reads is never left out.
"""

from __future__ import annotations

import logging
import sys
from time import monotonic
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_MOST_LINES = 20
_WHILE_S = 10.0
_MOST_EVENTS = 1000

# Imported and made here, at the start: a server without free descriptors could not import what a traceback takes.
_NO_LOCALS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
)


def set_up(log_format: str) -> None:
    """Write the log to standard error, for people ("console") or programs ("json")."""
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        RateLimit(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        processors += [_NO_LOCALS, structlog.processors.JSONRenderer(default=repr)]
    else:
        processors += [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=NeverRaising,
        logger_factory=lambda *_: LossyWriter(sys.stderr),
        cache_logger_on_first_use=False,
    )


class NeverRaising(structlog.make_filtering_bound_logger(logging.INFO)):  # type: ignore[misc]
    """A logger whose calls return, whatever happens to the line."""

    def _proxy_to_logger(self, method_name: str, event: str | None = None, **event_kw: Any) -> Any:
        try:
            return super()._proxy_to_logger(method_name, event, **event_kw)
        except Exception:  # a line is not worth a thread
            return None


class LossyWriter:
    """Writes lines to a stream, and after some could not be written says how many."""

    _num_lost = 0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, message: str) -> None:
        """Write a line, if it can be written."""
        try:
            lost = LossyWriter._num_lost
            told = f"({lost} lines before this one could not be written)\n" if lost else ""
            self._stream.write(f"{told}{message}\n")
            self._stream.flush()
            LossyWriter._num_lost = 0
        except (OSError, ValueError, MemoryError):
            LossyWriter._num_lost += 1

    debug = info = warning = error = critical = exception = log = msg


class RateLimit:
    """Lets some of the warnings and errors with the same words through in a while, and counts the others."""

    def __init__(self, most_lines: int = _MOST_LINES, while_s: float = _WHILE_S) -> None:
        self._most_lines = most_lines
        self._while_s = while_s
        self._written: dict[str, list[float]] = {}
        """By event: when its while began, the lines written in it, and those left out."""

    def __call__(self, logger: WrappedLogger, name: str, event_dict: EventDict) -> EventDict:
        """Pass a line on, or leave it out."""
        if event_dict["level"] not in ("warning", "error") or event_dict.get("audit"):
            return event_dict
        now_s, event = monotonic(), str(event_dict["event"])
        told = self._written.setdefault(event, [now_s, 0, 0])
        if now_s - told[0] > self._while_s:
            told[0], told[1] = now_s, 0
        if told[1] >= self._most_lines:
            told[2] += 1
            raise structlog.DropEvent
        told[1] += 1
        if told[2]:
            event_dict["num_left_out"] = int(told[2])
            told[2] = 0
        if len(self._written) > _MOST_EVENTS:
            self._written.clear()
        return event_dict
