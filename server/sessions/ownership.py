"""Ownership: which sessions this replica has, and how they come in and go out.

A session that is not in memory is brought in by its next call: this replica claims it, and its state is replayed
(`replay.py`) while its queue waits. Another replica that needs a session asks for it, and is given it after what is
in its queue. When the lease has run out, nothing that was known of any session counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from server.errors import (
    LeaseLapsedError,
    ModelMismatchError,
    ModelNotLoadedError,
    ServingError,
    SessionCorruptError,
    WrongReplicaError,
)
from server.sessions.changes import loss_by
from server.sessions.claims import check_lives, claim_session
from server.sessions.pager import Pager
from server.sessions.queues import SessionQueues
from server.sessions.replay import Replay
from server.sessions.served_model import ServedModel
from server.sessions.session import Session
from server.storage.async_store import AsyncStore
from server.storage.codec import DamagedError, SessionMetadata
from server.storage.interface import Claim, Entry, OwnedElsewhere, Write

FindModel = Callable[[str, int], ServedModel | None]


class Ownership:
    """Brings sessions into memory, and gives them away."""

    def __init__(
        self,
        store: AsyncStore,
        queues: SessionQueues,
        pager: Pager,
        replay: Replay,
        find_model: FindModel,
        handover_timeout_s: float,
    ) -> None:
        """No session is in memory.

        Args:
            store: where sessions are kept.
            queues: those in memory.
            pager: makes room for them.
            replay: brings their state back.
            find_model: a model in service, by name and version.
            handover_timeout_s: seconds to wait for a session that another replica owns.
        """
        self._store = store
        self._queues = queues
        self._pager = pager
        self._replay = replay
        self._find_model = find_model
        self._handover_timeout_s = handover_timeout_s
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        """What is being done about sessions that are not in memory."""
        self._epoch = 0
        """Counts the times that this replica's lease has run out: a claim of an earlier time is worth nothing."""
        store.lease.watch(self.drop_all, self.hand_over)

    # Coming in.

    async def find(self, session_id: str) -> Session:
        """A session, brought into memory if it is not there; its queue fills while its state is on its way.

        Raises:
            SessionNotFoundError, SessionExpiredError, SessionMovedError, ModelNotLoadedError, ModelMismatchError,
            RecoveryError, QueueFullError, StoreError, LeaseLapsedError.
        """
        while (session := self._queues.in_memory.get(session_id)) is None:
            self._queues.wanted[session_id] += 1
            try:
                await self._alone(session_id, lambda: self._bring_in(session_id))
            finally:
                self._queues.no_longer_wanted(session_id)
        if session.head is None:
            # A call is about to enter. If none does, it is idle after all.
            asyncio.get_running_loop().call_soon(self._queues.advance, session)
        return session

    async def claim_each(self, session_ids: Sequence[str]) -> dict[str, ServingError]:
        """Claim sessions together, for whoever calls `find` next; none that a live replica owns is waited for.

        Returns:
            those that cannot be brought in, and why: WrongReplicaError for what another replica owns.
        """
        in_memory = self._queues.in_memory
        missing = [i for i in session_ids if i not in in_memory and i not in self._under_way]
        if not missing:
            return {}
        claiming = self._queues.spawn(self._claim_each(missing, self._epoch))
        self._under_way |= dict.fromkeys(missing, claiming)
        try:
            return await asyncio.shield(claiming)
        except ServingError as error:
            return dict.fromkeys(missing, error)

    async def _claim_each(self, session_ids: Sequence[str], epoch: int) -> dict[str, ServingError]:
        """Claim sessions, and begin to make those that live sessions in memory; returns the others."""
        refused: dict[str, ServingError] = {}
        try:
            claims = await self._store.claim(session_ids) if session_ids else []
        finally:
            for session_id in session_ids:
                del self._under_way[session_id]
        for session_id, found in zip(session_ids, claims, strict=True):
            try:
                if isinstance(found, OwnedElsewhere):
                    raise WrongReplicaError(session_id, found.owner)
                check_lives(session_id, found)
            except ServingError as error:
                refused[session_id] = error
            else:
                self._begin(session_id, partial(self._admit, session_id, found, epoch))
        return refused

    async def end_absent(
        self,
        session_id: str,
        reason: Literal["DELETED", "EXPIRED"],
        last_use_before_s: float = float("inf"),
    ) -> None:
        """End a session that is not in memory, whatever state it is in, if it was last used before a service time.

        Raises:
            SessionNotFoundError, SessionMovedError, StoreError, LeaseLapsedError.
        """

        async def end() -> None:
            claim = await claim_session(self._store, session_id, self._handover_timeout_s)
            if claim.entry.last_use_s >= last_use_before_s:
                return
            try:
                metadata = SessionMetadata.decode(claim.entry.content).ended(reason)
            except DamagedError:
                metadata = SessionMetadata("", 0, "", 0.0, 0, end_reason=reason)
            entry = replace(claim.entry, content=metadata.encode(), end_time_s=self._store.time_s)
            write = Write(session_id, claim.fence, entry.next_step, entry.last_use_s, entry=entry)
            outcome = await self._store.commit_one(write)
            if outcome is not None:
                raise loss_by(outcome, session_id)

        await self._alone(session_id, end)

    def is_busy_with(self, session_id: str) -> bool:
        """Whether a session is being brought in or ended."""
        return session_id in self._under_way

    async def settled(self, session_id: str) -> None:
        """Wait until nothing is under way about a session that is not in memory."""
        while (task := self._under_way.get(session_id)) is not None:
            await asyncio.wait([task])

    async def _alone(self, session_id: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do something about a session that is not in memory, or wait for what is being done already."""
        task = self._under_way.get(session_id) or self._begin(session_id, work)
        # Whoever waits may leave; the others, and what was begun, go on.
        await asyncio.shield(task)

    def _begin(self, session_id: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        async def do() -> None:
            try:
                await work()
            finally:
                del self._under_way[session_id]

        task = self._under_way[session_id] = self._queues.spawn(do())
        return task

    async def _bring_in(self, session_id: str) -> None:
        epoch = self._epoch
        claim = await claim_session(self._store, session_id, self._handover_timeout_s)
        await self._admit(session_id, claim, epoch)

    async def _admit(self, session_id: str, found: Claim | Entry | None, epoch: int) -> None:
        """Make a claim of an epoch a session in memory, and begin to bring its state back."""
        claim = check_lives(session_id, found)
        entry = claim.entry
        metadata, served = self._read_entry(entry)
        index = await self._pager.take_index(served)
        if epoch != self._epoch:
            served.table.give_up(index)
            raise LeaseLapsedError
        session = Session(
            session_id,
            entry.request_id,
            served,
            index,
            metadata,
            claim.fence,
            entry.next_step,
            entry.last_use_s,
        )
        self._queues.admit(session)
        try:
            self._replay.begin(session, claim)
        except ServingError as error:
            self._queues.lose(session, error)
            raise
        self._queues.advance(session)

    def _read_entry(self, entry: Entry) -> tuple[SessionMetadata, ServedModel]:
        """What an entry says of its session, and the model, if it is served here."""
        try:
            metadata = SessionMetadata.decode(entry.content)
        except DamagedError as error:
            raise SessionCorruptError(entry.session_id, str(error)) from error
        served = self._find_model(entry.model_name, metadata.model_version)
        label = f"{entry.model_name}/{metadata.model_version}"
        if served is None:
            raise ModelNotLoadedError(entry.session_id, label)
        if served.model.digest != metadata.model_digest:
            raise ModelMismatchError(label, metadata.model_digest, served.model.digest)
        return metadata, served

    # Going out.

    def hand_over(self, session_ids: Sequence[str]) -> None:
        """Give sessions to other replicas that ask for them, after what is in their queues."""
        for session_id in session_ids:
            session = self._queues.in_memory.get(session_id)
            if session is not None:
                if not session.is_leaving:
                    self._give_away(session)
            elif session_id not in self._under_way:
                self._queues.spawn(self._store.release(session_id))

    def drop_all(self) -> None:
        """Other replicas may have taken these sessions over: forget what is known of them."""
        self._epoch += 1
        for session in [*self._queues.in_memory.values()]:
            self._queues.lose(session, LeaseLapsedError())

    def release_model(self, served: ServedModel) -> None:
        """Give the sessions of one model that are in memory to the store, after what is in their queues."""
        for session in [*self._queues.in_memory.values()]:
            if session.model is served and not session.is_leaving:
                self._give_away(session)

    async def release_all(self, timeout_s: float) -> bool:
        """Give every session back to the store, so that whoever comes next finds snapshots and no records behind.

        Says whether all were given back in time; the others are found as the store has them.
        """
        leaving = [
            self._give_away(session)
            for session in [*self._queues.in_memory.values()]
            if not session.is_leaving
        ]
        waiting = {*leaving, *self._replay.under_way}
        if not waiting:
            return True
        _, late = await asyncio.wait(waiting, timeout=timeout_s)
        return not late

    def _give_away(self, session: Session) -> asyncio.Task[None]:
        """Begin to give a session to the store or to another replica; nothing more may enter its queue."""
        leaving = self._pager.page_out(session)
        session.is_leaving = True
        return self._queues.spawn(self._has_left(session, leaving))

    @staticmethod
    async def _has_left(session: Session, leaving: asyncio.Task[None]) -> None:
        await leaving
        if session.loss is None:  # its state could not be read: it stays, and can be asked for again
            session.is_leaving = False
