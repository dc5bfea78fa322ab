"""Following: a call that is traced learns when its requests waited, ran and were committed.

A follower stands between a request and whoever waits for its answer, where there is one; else nothing is added to a
request's way. The times are the request's own. `rpc/tracing.py` has the one follower there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from server.sessions.request import EngineCall, ReplyTo, StepRequest, TimesS


class Follower(Protocol):
    """Whoever is told of requests before they are answered."""

    def note(self, request: StepRequest | EngineCall, commit_times_s: TimesS | None = None) -> None:
        """A request is over."""


_current: ContextVar[Follower | None] = ContextVar("follower", default=None)


@contextmanager
def followed_by(follower: Follower) -> Iterator[None]:
    """Around what is done for a call that is followed."""
    before = _current.set(follower)
    try:
        yield
    finally:
        _current.reset(before)


def current_follower() -> Follower | None:
    """Who follows the call that runs in this task."""
    return _current.get()


def followed(reply_to: ReplyTo) -> ReplyTo:
    """Who waits for a request, with the follower of this task's call before it if there is one."""
    follower = _current.get()
    return reply_to if follower is None else Followed(reply_to, follower)


class Followed:
    """Whoever waits for requests, and a follower that is told first."""

    __slots__ = ("_follower", "_reply_to")

    def __init__(self, reply_to: ReplyTo, follower: Follower) -> None:
        """Nothing is known yet."""
        self._reply_to = reply_to
        self._follower = follower

    def reply(self, request: StepRequest) -> None:
        """Tell both."""
        try:
            self._follower.note(request, request.commit_times_s)
        finally:
            self._reply_to.reply(request)

    def add(self, request: StepRequest) -> None:
        """Some of a request's sessions go on in one of their own, which is followed too."""
        self._reply_to.add(request)
