"""Wait limit: when a queue is too long, judged by how long those in it wait (CoDel, RFC 8289).

The engine has one for what waits for its first turn, and the native transport one for calls that wait for the event
loop. A long wait alone is no overload: after a pause of the machine all have waited, and soon nobody does.
"""

from __future__ import annotations

import math


class WaitLimit:
    """Whether more comes than can be done, as told by the waits of those whose turn it is."""

    def __init__(self, limit_s: float = math.inf) -> None:
        """Nobody waits.

        Args:
            limit_s: seconds that anybody may wait, inf for no limit.
        """
        self.limit_s = limit_s
        self.is_reached = False
        """Whether waits have been over half of the limit for half of it: one more would wait too long."""
        self._long_since_s = math.inf
        self._last_s = -math.inf

    @property
    def is_near(self) -> bool:
        """Whether waits are over half of the limit."""
        return self._long_since_s < math.inf

    def note(self, since_s: float, now_s: float) -> None:
        """Somebody who has waited since a time has his turn now; both in seconds of one clock."""
        is_first = since_s > self._last_s  # nobody waited in between
        self._last_s = now_s
        if is_first or now_s - since_s <= self.limit_s / 2:
            self.clear()
        if now_s - since_s <= self.limit_s / 2:
            return
        self._long_since_s = min(self._long_since_s, now_s)
        self.is_reached = now_s - self._long_since_s > self.limit_s / 2

    def clear(self) -> None:
        """Nobody waits."""
        self._long_since_s, self.is_reached = math.inf, False
