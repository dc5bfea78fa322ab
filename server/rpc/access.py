"""Access: what the caller of an rpc may reach, how much of it, and the line in the log that says what it did.

Services ask here, by the principal that the interceptor has found. Where callers are not told apart and nothing is
bounded, it costs next to nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import structlog

from server.errors import QuotaExceededError
from server.metrics import Metrics
from server.security import (
    Authenticator,
    Namespace,
    QuotaEnforcer,
    Quotas,
    Usage,
    current_principal,
    split_key,
)
from server.sessions.info import SessionInfo
from server.sessions.manager import SessionManager
from server.sessions.queues import queue_too_slow
from server.sessions.served_model import ServedModel

log = structlog.get_logger()

_RECORD_BYTES = 64
"""What a message of one step has in a store beside its inputs and outputs, about."""


T = TypeVar("T", bound="_Awaited")


class _Awaited(Protocol):
    @property
    def future(self) -> asyncio.Future[Any]:
        """Done when nobody waits any more."""


class Access:
    """Who may reach what, for the services of one server."""

    def __init__(
        self,
        sessions: SessionManager,
        authenticator: Authenticator,
        quotas: Quotas,
        snapshot_every_steps: int,
        metrics: Metrics,
    ) -> None:
        """Nobody has anything yet.

        Args:
            sessions: all there are.
            authenticator: knows owners and admins.
            quotas: of each principal.
            snapshot_every_steps: how many steps the store keeps at most, about.
            metrics: where steps are counted by principal.
        """
        self._sessions = sessions
        self._authenticator = authenticator
        self._quotas = QuotaEnforcer(quotas)
        self._snapshot_every_steps = snapshot_every_steps
        self._metrics = metrics

    def namespace(self, owner: str, *, may_be_all: bool = False) -> Namespace:
        """Where the caller looks; its own sessions for "".

        Raises:
            PermissionDeniedError: it may not look at another owner's.
        """
        principal = current_principal()
        if not owner:
            return principal.namespace
        return self._authenticator.namespace_for(principal, owner, may_be_all=may_be_all)

    def owner_of(self, key: str) -> str:
        """The name of the principal that a session belongs to."""
        return self._authenticator.owner_of(key)

    @property
    def counts_steps(self) -> bool:
        """Whether steps are counted for each principal."""
        return self._quotas.counts_steps or self._authenticator.tells_apart

    def begin_steps(self, served: ServedModel, num_steps: int, enter: Callable[[], T]) -> T:
        """Let steps of the caller in by what enters them; they count until its future is done.

        Raises:
            QuotaExceededError: they are too many. QueueTooSlowError: the model has more to do than it can, and more of
            it is the caller's than of others. Whatever `enter` raises.
        """
        if not self.counts_steps:
            return enter()
        name = self._begin_steps(served, num_steps)
        try:
            entered = enter()
        except BaseException:
            self._quotas.end_steps(name, num_steps)
            raise
        entered.future.add_done_callback(lambda _: self._quotas.end_steps(name, num_steps))
        return entered

    @contextmanager
    def steps(self, served: ServedModel, num_steps: int) -> Iterator[None]:
        """Around steps of the caller, which count until they have ended.

        Raises:
            QuotaExceededError, QueueTooSlowError: as `begin_steps`.
        """
        if not self.counts_steps:
            yield
            return
        name = self._begin_steps(served, num_steps)
        try:
            yield
        finally:
            self._quotas.end_steps(name, num_steps)

    def _begin_steps(self, served: ServedModel, num_steps: int) -> str:
        name = current_principal().name
        if served.engine.wait_limit.is_near and self._quotas.has_more_than_its_share(name):
            raise queue_too_slow(served)
        self._quotas.begin_steps(name, num_steps)
        if self._authenticator.tells_apart:
            self._metrics.count_principal_steps(name, num_steps)
        return name

    async def begin(
        self, make: Callable[[], Awaitable[SessionInfo]], model_name: str, request_key: str
    ) -> SessionInfo:
        """Make a session of the caller's, if it may have one more; a request that made one before gets that.

        Raises:
            QuotaExceededError: it has too many. Whatever `make` raises.
        """
        if not self._quotas.counts_sessions:
            return await make()
        principal = current_principal()
        try:
            async with self._quotas.beginning(
                principal.name, self._most_bytes(model_name), lambda: self._usage(principal.namespace)
            ):
                return await make()
        except QuotaExceededError:
            if request_key and await self._sessions.store.find_request(request_key) is not None:
                return await make()  # a repeat: nothing new begins
            raise

    async def _usage(self, namespace: Namespace) -> Usage:
        count = self._sessions.store.count
        num_bytes = 0
        for name in {served.model.name for served in self._sessions.models}:
            num_bytes += await count(*namespace.range, name) * self._most_bytes(name)
        return Usage(await count(*namespace.range, ""), num_bytes)

    def _most_bytes(self, model_name: str) -> int:
        """The most that a session of a model can take in the store; of any model for ""."""
        return max(
            (
                self._most_bytes_of(served)
                for served in self._sessions.models
                if model_name in ("", served.model.name)
            ),
            default=0,
        )

    def _most_bytes_of(self, served: ServedModel) -> int:
        model = served.model
        num_steps = served.limits.retry_window_steps + self._snapshot_every_steps
        return model.state_bytes + num_steps * (
            model.inputs.step_bytes + model.outputs.step_bytes + _RECORD_BYTES
        )

    def audit(self, what: str, key: str, **about: str) -> None:
        """Say in the log what the caller did to a session, where callers are told apart."""
        if self._authenticator.tells_apart:
            owner, session_id = split_key(key)
            log.info(
                what,
                audit=True,
                principal=current_principal().name,
                owner=owner or self.owner_of(key),
                session_id=session_id,
                **about,
            )
