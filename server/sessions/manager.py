"""Manager: everything a caller can ask of sessions, without gRPC.

A session is created (`creation.py`), stepped (`executor.py`), reset, looked at, exported, listed and ended.
`ownership.py` knows which sessions are in memory, and the store makes it last. Calls that name what they do (a step's
number, a request's id) can be repeated, and take effect once.

`rpc/` checks what callers send before it comes here.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import structlog

from ntm.tensor import Array
from server.errors import (
    LeaseLapsedError,
    QueueFullError,
    RecoveryError,
    ServingError,
    SessionExpiredError,
    SessionMovedError,
    SessionNotFoundError,
    StoreFullError,
)
from server.model.layout import Steps
from server.runtime.runner import INITIAL_SLOT
from server.sessions.changes import change_of, commit_change
from server.sessions.claims import end_error
from server.sessions.creation import Creation
from server.sessions.executor import StepExecutor
from server.sessions.following import current_follower, followed
from server.sessions.info import SessionInfo, SessionInfos
from server.sessions.models import ServedModels
from server.sessions.ownership import Ownership
from server.sessions.pager import Pager
from server.sessions.queues import queue_full, queue_too_slow
from server.sessions.replay import Replay
from server.sessions.request import BatchReply, EngineCall, StepRequest, StepResult, Waiter
from server.sessions.served_model import ServedModel
from server.sessions.session import Session
from server.sessions.watching import Frame
from server.storage.async_store import AsyncStore
from server.storage.codec import DamagedError, SessionMetadata, encode_snapshot
from server.storage.interface import Entry

log = structlog.get_logger()

RETIREMENT_S = 24 * 3600
_IDLE_AT_ONCE = 1000
_LISTED_AT_ONCE = 1000


class SessionManager:
    """All sessions of all models."""

    def __init__(
        self,
        store: AsyncStore,
        *,
        snapshot_every_steps: int,
        recovery: Literal["exact", "approximate"],
        handover_timeout_s: float,
        idle_limit_s: float | None,
        max_retired_ids: int,
    ) -> None:
        """No model is in service.

        Args:
            store: where sessions are kept.
            snapshot_every_steps: how many steps a recovery has to replay at most, about.
            recovery: whether a session may be replayed on another machine or build than it ran on.
            handover_timeout_s: seconds to wait for a session that another replica owns.
            idle_limit_s: seconds without a call after which a session ends, or None.
            max_retired_ids: ended sessions that the store keeps the ids of.
        """
        self.store = store
        self.models = ServedModels()
        self.executor = StepExecutor(store, snapshot_every_steps)
        self._queues = self.executor.queues
        self.in_memory = self._queues.in_memory
        self.watching = self._queues.watching
        self._idle_limit_s = idle_limit_s
        self._max_retired_ids = max_retired_ids
        replay = Replay(store, self._queues, recovery)
        pager = Pager(store, self.executor, handover_timeout_s)
        self.ownership = Ownership(store, self._queues, pager, replay, self.models.get, handover_timeout_s)
        self._infos = SessionInfos(store, self._queues, idle_limit_s)
        creation = Creation(store, self.models, self.executor, self.ownership, replay, self._infos)
        self.create = creation.create
        self.fork = creation.fork
        self.import_snapshot = creation.import_snapshot
        self.find = self.ownership.find

    # Steps and state.

    async def step(
        self, session: Session, inputs: Steps, first_step: int | None = None, wants_state: bool = False
    ) -> StepResult:
        """Run steps [T], or answer them from the retry window where they are a repeat.

        Raises:
            SessionNotFoundError, QueueFullError, StepOrderError, StepFailedError, EngineFailedError, StoreError,
            SessionMovedError, RecoveryError.
        """
        waiter = Waiter()
        request = StepRequest(
            [session],
            inputs[None],
            None if first_step is None else (first_step,),
            followed(waiter),
            wants_state,
        )
        self.executor.admit([request])
        try:
            await waiter.future
        except BaseException:
            self.executor.cancel(request)
            raise
        return request.result()

    async def step_alone(self, served: ServedModel, inputs: Steps) -> StepResult:
        """Run steps [T] of nobody's session, from the initial state; nothing is kept.

        Raises:
            QueueFullError, StepFailedError, EngineFailedError.
        """
        if served.num_pending >= served.limits.max_pending_messages or not served.slots.num_free:
            raise queue_full(served)
        if served.engine.wait_limit.is_reached:
            raise queue_too_slow(served)
        slot = served.slots.take()
        served.num_pending += 1
        call = EngineCall([""], (0,), inputs[None], (INITIAL_SLOT,), (slot,), reads_state=True)
        call.is_from_caller = True
        try:
            await served.run(call)
        finally:
            served.num_pending -= 1
            # Whoever leaves while it runs must not give the slot to another.
            call.future.add_done_callback(lambda _: served.slots.release(slot))
        if (follower := current_follower()) is not None:
            follower.note(call)
        if call.errors:
            raise call.errors[0]
        assert call.outputs is not None
        assert call.state is not None
        state = {name: values[0] for name, values in call.state.items()}
        return StepResult(call.outputs[0], len(inputs), state)

    def admit_each(
        self,
        session_ids: Sequence[str],
        sessions: Sequence[Session | ServingError | None],
        inputs: Steps,
        first_steps: Sequence[int],
        check: Callable[[Session], None],
    ) -> BatchReply:
        """Run the steps of several sessions, each as `step` does, in as few requests as can go together.

        `finish_each` waits for them.

        Args:
            session_ids: S ids, none twice.
            sessions: for each the session, if it is in memory, or why there can be none; the others are brought in, as
                room is made, and run when they are there.
            inputs: [S, T], T at least 1, checked.
            first_steps: for each session the index of its first input, or empty.
            check: raises a ServingError for a session brought in that the inputs do not fit.
        """
        batch = BatchReply(session_ids, inputs.shape[1])
        reply_to = followed(batch)
        missing = [position for position, session in enumerate(sessions) if session is None]

        def request(positions: Sequence[int], found: list[Session]) -> StepRequest:
            is_all = len(positions) == len(session_ids)
            return StepRequest(
                found,
                inputs if is_all else inputs[[*positions]],
                [first_steps[position] for position in positions] if first_steps else None,
                reply_to,
                positions=positions,
            )

        wanted = {session_ids[position]: position for position in missing}

        async def step_when_there(session_id: str) -> None:
            position = wanted[session_id]
            try:
                session = await self.find(session_id)
                check(session)
            except Exception as error:  # a bug must not keep anybody waiting
                batch.fail(position, error)
            else:
                alone = request([position], [session])
                batch.add(alone)
                self.executor.admit([alone])
            finally:
                self._queues.no_longer_wanted(session_id)
                del wanted[session_id]

        async def step_missing() -> None:
            self._queues.wanted.update([*wanted])
            try:
                for session_id, error in (await self.ownership.claim_each([*wanted])).items():
                    self._queues.no_longer_wanted(session_id)
                    batch.fail(wanted.pop(session_id), error)
                await asyncio.gather(*map(step_when_there, [*wanted]))
            except Exception as error:
                for position in wanted.values():
                    batch.fail(position, error)
            finally:
                for session_id in wanted:
                    self._queues.no_longer_wanted(session_id)

        for requests in self._grouped(batch, sessions):
            together = request(*requests)
            batch.add(together)
            self.executor.admit([together])
        if missing:
            batch.bringing_in = self._queues.spawn(step_missing())
        return batch

    async def finish_each(self, batch: BatchReply) -> BatchReply:
        """Wait until all of a batch is known; whoever is cancelled here cancels what has not begun."""
        try:
            await batch.future
        except BaseException:
            if batch.bringing_in is not None:
                batch.bringing_in.cancel()
            for under_way in [*batch.requests]:
                self.executor.cancel(under_way)
            raise
        return batch

    def _grouped(
        self, batch: BatchReply, sessions: Sequence[Session | ServingError | None]
    ) -> list[tuple[list[int], list[Session]]]:
        """Sessions of a batch that can go together, no more than fit into a run, by their positions.

        Those do that wait for nothing, or for the same request of several. What cannot be enqueued is told the batch.
        """
        groups = defaultdict[object, list[int]](list)
        if all_idle := _all_idle(sessions):
            groups[all_idle] = [*range(len(sessions))]
            sessions_left: Sequence[Session | ServingError | None] = ()
        else:
            sessions_left = sessions
        for position, session in enumerate(sessions_left):
            if session is None:
                continue
            if isinstance(session, ServingError):
                batch.fail(position, session)
                continue
            last = session.last_entry
            is_plain = session.is_ready and session.loss is None and not session.is_leaving
            if is_plain and (last is None or (isinstance(last, StepRequest) and len(last.sessions) > 1)):
                groups[session.model, last].append(position)
            else:
                groups[position].append(position)
        parts: list[tuple[list[int], list[Session]]] = []
        num_taken = defaultdict[ServedModel, int](int)
        for positions in groups.values():
            members: list[Session] = [sessions[position] for position in positions]  # type: ignore[misc]
            model = members[0].model
            num_free = model.limits.max_pending_messages - model.num_pending - num_taken[model]
            num_free = max(0, num_free)
            for position in positions[num_free:]:
                batch.fail(position, queue_full(model))
            num_taken[model] += min(num_free, len(positions))
            size = model.runner.max_batch_size
            for start in range(0, min(num_free, len(positions)), size):
                part = slice(start, min(start + size, num_free))
                parts.append((positions[part], members[part]))
        return parts

    async def state(self, session: Session) -> tuple[int, dict[str, Array]]:
        """A session's counter and state after what is in its queue: by name, in the graph's axes.

        Raises:
            As `step`.
        """

        async def read(session: Session) -> tuple[int, dict[str, Array]]:
            state = await self.executor.read_state(session)
            return session.next_step, state

        return await self._queues.exclusively(session, read, needs_device=True)

    async def export(self, session: Session) -> bytes:
        """A session's whole state, as a safetensors file.

        Raises:
            As `step`.
        """
        next_step, state = await self.state(session)
        return encode_snapshot(session.model.model, next_step, state, session.metadata.initial_state)

    async def reset(self, session_id: str, at_step: int | None) -> SessionInfo:
        """Put a session back to the state it began from; a repeat of a reset made before changes nothing.

        Raises:
            As `step`.
        """

        async def reset(session: Session) -> SessionInfo:
            step = session.next_step if at_step is None else at_step
            windows, index = session.table.retry_windows, session.index
            if windows.was_reset_at(index, step):
                return self._infos.of(session)
            windows.check_is_at(index, step)
            metadata = replace(
                session.metadata,
                snapshot_step=step,
                snapshot_checksum=0,
                reset_steps=(*windows.reset_steps(index), step),
                failure=None,
            )
            write = change_of(session, metadata, self.store.service_time_s, snapshot=b"")
            await commit_change(self.store, self._queues, session, metadata, write)
            session.move_to(session.model.slots.hold(session.initial_slot))
            windows.add_reset(index)
            if self.watching.of:
                self.watching.offer(session.session_id, Frame(step, None, None, step, {}))
            return self._infos.of(session)

        return await self._queues.exclusively(await self.find(session_id), reset)

    # Ends.

    async def delete(self, session_id: str, allow_missing: bool) -> None:
        """End a session after what is in its queue, and retire its id.

        Raises:
            SessionNotFoundError: unless `allow_missing`. As `step` otherwise.
        """
        try:
            await self._delete(session_id)
        except SessionNotFoundError:
            if not allow_missing:
                raise

    async def _delete(self, session_id: str) -> None:
        while True:
            session = self.in_memory.get(session_id)
            if session is None and self.ownership.is_busy_with(session_id):
                await self.ownership.settled(session_id)
            elif session is None:
                await self.ownership.end_absent(session_id, "DELETED")
                return
            else:
                try:
                    await self._queues.exclusively(session, self._end_as_deleted)
                    return
                except (RecoveryError, StoreFullError):
                    log.info("a session that cannot be brought back is deleted", session_id=session_id)

    async def _end_as_deleted(self, session: Session) -> None:
        await self._end(session, "DELETED", SessionNotFoundError(session.session_id))

    async def _end_as_expired(self, session: Session) -> None:
        await self._end(session, "EXPIRED", SessionExpiredError(session.session_id))

    async def _end(self, session: Session, reason: Literal["DELETED", "EXPIRED"], loss: ServingError) -> None:
        metadata = session.metadata.ended(reason)
        write = change_of(session, metadata, self.store.service_time_s, end_time_s=self.store.time_s)
        await commit_change(self.store, self._queues, session, metadata, write)
        self._queues.lose(session, loss)

    async def expire_idle(self) -> None:
        """End the sessions that no call has used for the idle limit, if there is one.

        Raises:
            StoreError, LeaseLapsedError.
        """
        if self._idle_limit_s is not None:
            await self.end_idle(self._idle_limit_s, lambda _: True)

    async def end_idle(self, limit_s: float, is_meant: Callable[[str], bool]) -> None:
        """End the sessions that no call has used for so many seconds, of those that are meant by their key.

        Raises:
            StoreError, LeaseLapsedError.
        """
        now_s = self.store.service_time_s
        for served in self.models:
            for session in served.table.idle(now_s - limit_s):
                if is_meant(session.session_id):
                    log.info("session expired", session_id=session.session_id, idle_limit_s=limit_s)
                    self._expire(session)
        if not self.store.backend.keeps_steps:
            return
        before_s = now_s - limit_s
        for session_id in await self.store.find_idle(before_s, _IDLE_AT_ONCE):
            is_here = session_id in self.in_memory or self.ownership.is_busy_with(session_id)
            if is_here or not is_meant(session_id):
                continue
            try:
                await self.ownership.end_absent(session_id, "EXPIRED", before_s)
                log.info("session expired", session_id=session_id)
            except (SessionNotFoundError, SessionMovedError):
                continue

    def _expire(self, session: Session) -> None:
        """End a session after what is in its queue."""
        try:
            turn = self._queues.enter(session)
        except (QueueFullError, SessionMovedError):
            return  # it is used, or leaves
        self._queues.spawn(self._queues.finish(turn, self._end_as_expired))

    async def purge(self) -> None:
        """Forget the sessions that ended long enough ago, or are too many, so that their ids can be used again.

        Raises:
            StoreError.
        """
        too_many_s = await self.store.time_of_ended(self._max_retired_ids - 1)
        await self.store.purge(max(self.store.time_s - RETIREMENT_S, too_many_s))

    # Looking.

    async def get(self, session_id: str) -> SessionInfo:
        """A session as it is, wherever it is.

        Raises:
            SessionNotFoundError, SessionExpiredError, StoreError, LeaseLapsedError.
        """
        session = self.in_memory.get(session_id)
        if session is not None:
            if not self.store.holds_lease:
                raise LeaseLapsedError
            return self._infos.of(session)
        entry = await self.store.look(session_id)
        if entry is None:
            raise SessionNotFoundError(session_id)
        if entry.end_time_s is not None:
            raise end_error(entry)
        return self._infos.of_entry(entry)

    async def page(self, after: str, size: int, model_name: str) -> tuple[list[SessionInfo], bool]:
        """Up to `size` sessions with ids after `after`, ascending, and whether there are more.

        Raises:
            StoreError.
        """
        entries = await self.store.page(after, size + 1, model_name)
        return [self._infos.of_entry(entry) for entry in entries[:size]], len(entries) > size

    # Models that come and go.

    async def find_session_of(self, served: ServedModel, at_or_after: str) -> str | None:
        """The first living session of a version, in memory or in the store, whose id is not before a given one.

        Raises:
            StoreError.
        """
        name, version = served.model.name, served.model.version
        entry = await self.store.look(at_or_after) if at_or_after else None
        entries = [entry] if entry is not None and entry.end_time_s is None else []
        after = at_or_after
        while True:
            for entry in entries:
                if entry.model_name == name and _version(entry) == version:
                    return entry.session_id
            entries = await self.store.page(after, _LISTED_AT_ONCE, name)
            if not entries:
                return None
            after = entries[-1].session_id

    def take_out_of_service(self, served: ServedModel) -> bool:
        """See to it that a version is no longer used: its sessions go to the store or, without one, end as expired.

        Says whether nobody uses it any more. Until then it is to be called again: more may have been on their way in.
        """
        served.is_draining = True
        self.models.remove(served)
        if self.store.backend.keeps_steps:
            self.ownership.release_model(served)
        else:
            for session in [*self.in_memory.values()]:
                if session.model is served and not session.is_leaving:
                    turn = self._queues.enter(session, is_our_own=True)
                    self._queues.spawn(self._queues.finish(turn, self._end_as_expired))
                    session.is_leaving = True
        return served.table.is_empty


def _all_idle(sessions: Sequence[Session | ServingError | None]) -> ServedModel | None:
    """The model of sessions that are all its, and all idle, as those of most batches are."""
    if any(type(session) is not Session for session in sessions):
        return None
    found: Sequence[Session] = sessions  # type: ignore[assignment]
    model = found[0].model
    if any(session.model is not model for session in found):
        return None
    indices = np.fromiter([session.index for session in found], np.int64)
    return model if model.table.is_idle.each[indices].all() else None


def _version(entry: Entry) -> int | None:
    """The version of its model that a session belongs to; None if that cannot be read, so that it is of no use."""
    try:
        return SessionMetadata.decode(entry.content).model_version
    except DamagedError:
        return None
