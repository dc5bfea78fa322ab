"""Retries: which calls are repeated, after which pauses and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tenacity

from ntm._errors import ClientError, UnavailableError

_PAUSE = tenacity.wait_random_exponential(multiplier=0.05, max=2.0)


def retrying(retry_for_s: float, is_closed: Callable[[], bool]) -> dict[str, Any]:
    """tenacity's settings: repeat what was unavailable, and what the server says when to repeat, for a bounded time.

    Pauses are random and grow, and are as long as the server says at least. A call that ends because its own client was
    closed is not repeated.
    """

    def may_be_repeated(error: BaseException) -> bool:
        wanted = isinstance(error, UnavailableError) or _retry_after_s(error) is not None
        return wanted and not is_closed()

    return {
        "retry": tenacity.retry_if_exception(may_be_repeated),
        "wait": _wait,
        "stop": tenacity.stop_after_delay(retry_for_s),
        "reraise": True,
    }


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    # What the server says is the same for all whom it refuses: they are not to come back at once.
    return (_retry_after_s(error) or 0.0) + _PAUSE(state)


def _retry_after_s(error: BaseException | None) -> float | None:
    return error.retry_after_s if isinstance(error, ClientError) else None
