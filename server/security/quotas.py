"""Quotas: what one principal may take of what all share.

Steps a second are counted by a bucket that fills at the rate and holds a second's worth. A message is let in while
there is anything in it, and what it takes beyond that is owed, so that large messages pass at the rate of small ones.
Steps are counted by this server; sessions by the store, so by all replicas together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from server.errors import QuotaExceededError

_MAX_ACCOUNTS = 10_000
_QUEUE_RETRY_S = 0.1
_SESSIONS_RETRY_S = 1.0
MIB = 2**20


@dataclass(frozen=True)
class Quotas:
    """What each principal may have; None for as much as there is."""

    max_sessions: int | None = None
    max_stored_mib: int | None = None
    max_steps_per_s: float | None = None
    max_queued_steps: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a principal's living sessions take."""

    num_sessions: int
    stored_bytes: int


class _Account:
    __slots__ = ("num_beginning", "num_queued", "steps_left", "updated_s")

    def __init__(self, steps_left: float, now_s: float) -> None:
        self.steps_left = steps_left
        self.updated_s = now_s
        self.num_queued = 0
        self.num_beginning = 0

    @property
    def is_idle(self) -> bool:
        return not self.num_queued and not self.num_beginning


class QuotaEnforcer:
    """Holds principals to their quotas; for one event loop."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = monotonic) -> None:
        """Nobody has taken anything.

        Args:
            quotas: of each principal.
            clock: gives seconds.
        """
        self._quotas = quotas
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._num_queued = 0
        self._num_waiting = 0
        """Principals of whom some steps wait or run."""
        self.counts_steps: bool = quotas.max_steps_per_s is not None or quotas.max_queued_steps is not None
        self.counts_sessions: bool = quotas.max_sessions is not None or quotas.max_stored_mib is not None

    def begin_steps(self, principal: str, num_steps: int) -> None:
        """Let a message in; `end_steps` is to follow when it has been answered.

        Raises:
            QuotaExceededError: it is over a quota.
        """
        quotas, account = self._quotas, self._account(principal)
        most = quotas.max_queued_steps
        if most is not None and account.num_queued + num_steps > most:
            raise QuotaExceededError(
                principal,
                f"{account.num_queued} steps of {most} wait, and these are {num_steps}",
                _QUEUE_RETRY_S,
            )
        rate = quotas.max_steps_per_s
        if rate is not None:
            now_s = self._clock()
            account.steps_left = min(rate, account.steps_left + (now_s - account.updated_s) * rate)
            account.updated_s = now_s
            if account.steps_left <= 0.0:
                raise QuotaExceededError(
                    principal, f"it may run {rate:g} steps a second", (1e-3 - account.steps_left) / rate
                )
            account.steps_left -= num_steps
        self._queue(account, num_steps)

    def has_more_than_its_share(self, principal: str) -> bool:
        """Whether more steps of a principal wait or run than of those on average who have some."""
        return self._account(principal).num_queued * self._num_waiting > self._num_queued

    def end_steps(self, principal: str, num_steps: int) -> None:
        """A message that was let in has been answered, or will not be."""
        self._queue(self._account(principal), -num_steps)

    @asynccontextmanager
    async def beginning(
        self, principal: str, stored_bytes: int, usage: Callable[[], Awaitable[Usage]]
    ) -> AsyncIterator[None]:
        """Around the beginning of a session; those under way count as begun.

        Args:
            principal: whose it is to be.
            stored_bytes: the most that it can take in the store.
            usage: what the principal's sessions take.

        Raises:
            QuotaExceededError: there would be too many.
        """
        account, quotas = self._account(principal), self._quotas
        account.num_beginning += 1
        try:
            if self.counts_sessions:
                used = await usage()
                if quotas.max_sessions is not None:
                    self._check(
                        principal, "sessions", used.num_sessions + account.num_beginning, quotas.max_sessions
                    )
                if quotas.max_stored_mib is not None:
                    wanted_mib = -(-(used.stored_bytes + account.num_beginning * stored_bytes) // MIB)
                    self._check(principal, "MiB in the store", wanted_mib, quotas.max_stored_mib)
            yield
        finally:
            account.num_beginning -= 1

    def _queue(self, account: _Account, num_steps: int) -> None:
        was_waiting = account.num_queued > 0
        account.num_queued += num_steps
        self._num_queued += num_steps
        self._num_waiting += (account.num_queued > 0) - was_waiting

    def _check(self, principal: str, what: str, wanted: int, most: int) -> None:
        if wanted > most:
            raise QuotaExceededError(
                principal,
                f"it may have {most} {what}: delete sessions that are not needed",
                _SESSIONS_RETRY_S,
            )

    def _account(self, principal: str) -> _Account:
        account = self._accounts.get(principal)
        if account is None:
            account = self._accounts[principal] = _Account(self._quotas.max_steps_per_s or 0.0, self._clock())
            if len(self._accounts) > _MAX_ACCOUNTS:
                self._forget_idle(keep=principal)
        self._accounts.move_to_end(principal)
        return account

    def _forget_idle(self, keep: str) -> None:
        """Forget those who have nothing under way, but one, the longest unseen first, down to a half."""
        for name in [*self._accounts]:
            if len(self._accounts) <= _MAX_ACCOUNTS // 2:
                break
            if self._accounts[name].is_idle and name != keep:
                del self._accounts[name]
