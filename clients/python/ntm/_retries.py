"""Retries: which calls are repeated, after which pauses and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tenacity

from ntm._errors import UnavailableError


def retrying(retry_for_s: float, is_closed: Callable[[], bool]) -> dict[str, Any]:
    """tenacity's settings: repeat what was unavailable, with growing random pauses, for a bounded time.

    A call that ends because its own client was closed is not repeated.
    """
    return {
        "retry": tenacity.retry_if_exception(
            lambda error: isinstance(error, UnavailableError) and not is_closed()
        ),
        "wait": tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
        "stop": tenacity.stop_after_delay(retry_for_s),
        "reraise": True,
    }
