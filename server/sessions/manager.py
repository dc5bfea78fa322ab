"""Sessions: everything a caller can ask of sessions, without gRPC.

A session is created, stepped, reset, looked at, forked, taken out and put back, listed and ended. `lines.py` serves
one session's calls in order, `steps.py` runs their messages, `residence.py` knows which sessions are in memory, and
`journal.py` makes it last. Calls that name what they do (a step's number, a request's id) can be repeated, and take
effect once.

`service.py` checks what callers send before it comes here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import zlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import structlog

from ntm.tensor import Array
from server.errors import (
    InvalidInputError,
    LeaseLapsedError,
    ModelLeavingError,
    ModelMismatchError,
    ModelNotFoundError,
    NoFreeSlotError,
    RecoveryError,
    RequestIdReusedError,
    ServingError,
    SessionExistsError,
    SessionExpiredError,
    SessionIdRetiredError,
    SessionMovedError,
    SessionNotFoundError,
    StepOrderError,
    StoreFullError,
)
from server.runtime.runner import INITIAL_SLOT
from server.sessions.executor import Steps
from server.sessions.pager import Residence, end_error
from server.sessions.queues import Lines, move
from server.sessions.served_model import ServedModel
from server.sessions.session import Batch, Call, Session, StepResult
from server.sessions.watching import Frame
from server.storage.codec import (
    About,
    DamagedError,
    Snapshot,
    decode_snapshot,
    encode_snapshot,
    snapshot_metadata,
)
from server.storage.commit_writer import CommitWriter
from server.storage.interface import FIRST_FENCE, NEW, Entry, EntryExists, RequestExists, Write

log = structlog.get_logger()

RETIREMENT_S = 24 * 3600
_IDLE_AT_ONCE = 1000
_LISTED_AT_ONCE = 1000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as callers are told of it; times in seconds since the epoch."""

    session_id: str
    model_name: str
    model_version: int
    next_step: int
    create_time_s: float
    last_use_time_s: float
    expire_time_s: float | None
    is_approximate: bool


class SessionManager:
    """All sessions of all models."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        journal: CommitWriter,
        *,
        snapshot_every_steps: int,
        recovery: Literal["exact", "approximate"],
        handover_timeout_s: float,
        idle_limit_s: float | None,
    ) -> None:
        """Serve models.

        Args:
            models: those in service at first.
            journal: where sessions are kept.
            snapshot_every_steps: how many steps a recovery has to replay at most, about.
            recovery: whether a session may be replayed on another machine or build than it ran on.
            handover_timeout_s: seconds to wait for a session that another replica owns.
            idle_limit_s: seconds without a call after which a session ends, or None.
        """
        self._idle_limit_s = idle_limit_s
        self.models = {(served.model.name, served.model.version): served for served in models}
        self.journal = journal
        self._lines = Lines(journal)
        self.watching = self._lines.watching
        self._steps = Steps(self._lines, journal, snapshot_every_steps)
        self._residence = Residence(
            journal,
            self._lines,
            self._steps,
            lambda name, version: self.models.get((name, version)),
            recovery,
            handover_timeout_s,
        )
        self.in_memory = self._residence.sessions
        self.find = self._residence.find
        self.begin_to_find = self._residence.begin_to_find
        self.finish = self._lines.finish
        self.withdraw = self._lines.withdraw
        self.release_all = self._residence.release_all
        self._tasks: set[asyncio.Task[Any]] = set()

    # Models.

    def model(self, name: str, version: int | None) -> ServedModel:
        """A model by name; without a version the newest that takes new sessions.

        Raises:
            ModelNotFoundError: there is none.
        """
        if version is None:
            version = max(
                (v for (n, v), served in self.models.items() if n == name and not served.is_leaving),
                default=None,
            )
        served = self.models.get((name, version)) if version is not None else None
        if served is None:
            labels = sorted(s.model.label for s in self.models.values() if not s.is_leaving)
            raise ModelNotFoundError(name, version, labels)
        return served

    def add_model(self, served: ServedModel) -> None:
        """Put a version into service."""
        self.models[served.model.name, served.model.version] = served

    async def find_session_of(self, served: ServedModel, at_or_after: str) -> str | None:
        """The first living session of a version, in memory or in the store, whose id is not before a given one.

        Raises:
            StoreError.
        """
        name, version = served.model.name, served.model.version
        entry = await self.journal.look(at_or_after) if at_or_after else None
        entries = [entry] if entry is not None and entry.end_time_s is None else []
        after = at_or_after
        while True:
            for entry in entries:
                if entry.model_name == name and _version(entry) == version:
                    return entry.session_id
            entries = await self.journal.page(after, _LISTED_AT_ONCE, name)
            if not entries:
                return None
            after = entries[-1].session_id

    def take_out_of_service(self, served: ServedModel) -> bool:
        """See to it that a version is no longer used: its sessions go to the store or, without one, end as expired.

        Says whether nobody uses it any more. Until then it is to be called again: more may have been on their way in.
        """
        served.is_leaving = True
        self.models.pop((served.model.name, served.model.version), None)
        if self.journal.store.keeps_steps:
            self._residence.release_model(served)
        else:
            for session in [*self.in_memory.values()]:
                if session.model is served and not session.is_leaving:
                    ending = self._lines.enter(session, self._ending("EXPIRED"), is_our_own=True)
                    ending.future.add_done_callback(_look_at_error)
                    session.is_leaving = True
        return served.room.is_empty

    # Steps and state.

    def step(
        self,
        session: Session,
        inputs: Array,
        first_step: int | None,
        wants_state: bool = False,
        follows: Call | None = None,
    ) -> Call:
        """Run a message, or answer it from the records where it repeats one; `finish` gives its StepResult.

        Args:
            session: the session, just found.
            inputs: [T, ...input shape], T at least 1, checked.
            first_step: index of the first input, or None to run it as the next.
            wants_state: whether to return the state after the last step.
            follows: the call before it on its stream, if there is one.

        Raises (at once or through the future): SessionNotFoundError, QueueFullError, StepOrderError, StepFailedError,
            EngineFailedError, StoreError, SessionMovedError, RecoveryError.
        """
        return self._steps.step(session, inputs, first_step, wants_state, follows)

    def step_each(
        self,
        session_ids: Sequence[str],
        sessions: Sequence[Session | ServingError | None],
        served: ServedModel | None,
        inputs: Array,
        first_steps: Sequence[int],
        check: Callable[[Session], None],
    ) -> Batch:
        """Run the steps of several sessions, each as `step` does; `finish` gives a BatchResult.

        Args:
            session_ids: S ids, none twice.
            sessions: for each the session, if it is in memory, or why there can be none; the others are brought in, as
                room is made, and run when they are there.
            served: their model, if all are in memory and have the same.
            inputs: [S, T, ...input shape], T at least 1, checked.
            first_steps: for each session the index of its first input, or empty.
            check: raises a ServingError for a session brought in that the inputs do not fit.
        """
        batch = Batch(session_ids, inputs, first_steps)
        self._steps.enter_each(batch, sessions, served)
        missing = [index for index, session in enumerate(sessions) if session is None]
        if missing:
            self.begin_to_find([session_ids[index] for index in missing])

        async def step(index: int) -> None:
            try:
                session = await self.find(session_ids[index])
                check(session)
            except ServingError as error:
                batch.settle_error(index, error)
            else:
                self._steps.step_alone(batch, index, session)

        for index in missing:
            self._spawn(step(index))
        return batch

    async def state(self, session: Session) -> StepResult:
        """A session's state after the calls that wait before this one.

        Raises:
            As `step`.
        """

        def begin(call: Call) -> None:
            no_outputs, next_step = session.model.model.no_outputs, session.next_step
            self._steps.look(
                call, lambda state: self._lines.end(call, StepResult(no_outputs, next_step, state))
            )

        result: StepResult = await self.finish(self._lines.enter(session, begin, needs_device=True))
        return result

    async def reset(self, session_id: str, at_step: int | None) -> SessionInfo:
        """Put a session back to the initial state; a repeat of a reset made before changes nothing.

        Raises:
            As `step`.
        """

        def begin(call: Call) -> None:
            session = call.session
            step = session.next_step if at_step is None else at_step
            histories, place = session.model.histories, session.place
            if histories.was_reset_at(place, step):
                return self._lines.end(call, self.describe(session))
            histories.check_is_at(place, step)
            resets = (*histories.reset_steps(place), step)
            about = replace(
                session.about, snapshot_step=step, snapshot_checksum=0, reset_steps=resets, failure=None
            )

            def apply() -> None:
                move(session, INITIAL_SLOT)
                histories.add_reset(place)
                if self.watching.of:
                    self.watching.offer(session.session_id, Frame(step, None, None, step, {}))

            return self._change(call, about, apply, snapshot=b"")

        info: SessionInfo = await self.finish(self._lines.enter(await self.find(session_id), begin))
        return info

    def _change(
        self,
        call: Call,
        about: About,
        apply: Any = lambda: None,
        snapshot: bytes | None = None,
        end_time_s: float | None = None,
    ) -> None:
        """Change the session whose call is being served, and answer with what it is then."""
        session = call.session

        def committed(errors: list[ServingError | None]) -> None:
            if errors[0] is not None:
                self._lines.fail(call, errors[0])
            else:
                self._lines.end(call, self.describe(session))
            self._lines.serve(session)

        change = self._lines.change(session, about, apply, snapshot, end_time_s)
        self._lines.commit([change], committed)

    # Beginnings.

    async def create(
        self, model_name: str, version: int | None, session_id: str, request_id: str
    ) -> SessionInfo:
        """Create a session in the initial state, or return the one that this request made before.

        Args:
            model_name: name of the model.
            version: version of the model, or None for the newest.
            session_id: id of the session, or "" to have one made.
            request_id: names the request, or "".

        Raises:
            ModelNotFoundError, ModelLeavingError, SessionExistsError, SessionIdRetiredError, RequestIdReusedError,
            NoFreeSlotError, StoreError.
        """
        request = _request("create", model_name, version, session_id)
        try:
            served = self.model(model_name, version)
            about = About(request, served.model.version, served.model.digest, self.journal.time_s, 0)
            return await self._whole(self._add(served, session_id, request_id, about, 0))
        except (ModelNotFoundError, ModelLeavingError):
            # The model may have gone since this request was made for the first time.
            if repeated := await self._repeated(request_id, request):
                return repeated
            raise

    async def fork(
        self, source_session_id: str, at_step: int | None, session_id: str, request_id: str
    ) -> SessionInfo:
        """Copy a session as it is when its turn comes; both hold the same slot until one of them steps.

        Raises:
            As `create` and `step`.
        """
        request = _request("fork", source_session_id, at_step, session_id)

        def begin(call: Call) -> None:
            source = call.session
            if at_step is not None:
                source.model.histories.check_is_at(source.place, at_step)

            def copy(state: dict[str, Array] | None = None) -> None:
                self._spawn(self._fork(call, session_id, request_id, request, state))

            if self.journal.store.keeps_steps:
                self._steps.look(call, copy)
            else:
                copy()

        if repeated := await self._repeated(request_id, request):
            return repeated
        try:
            info: SessionInfo = await self.finish(
                self._lines.enter(await self.find(source_session_id), begin)
            )
        except StepOrderError:
            # The first of two may have waited in this line before the second, and the source has moved on since.
            if repeated := await self._repeated(request_id, request):
                return repeated
            raise
        return info

    async def _fork(
        self, call: Call, session_id: str, request_id: str, request: str, state: dict[str, Array] | None
    ) -> None:
        """Make the copy of the session whose call is being served."""
        source = call.session
        snapshot = b""
        if state is not None:
            snapshot = encode_snapshot(source.model.model, source.next_step, state)
        about = replace(
            source.about,
            request=request,
            create_time_s=self.journal.time_s,
            snapshot_step=source.next_step,
            snapshot_checksum=zlib.crc32(snapshot),
            reset_steps=(),
            num_recoveries=0,
            failure=None,
        )
        try:
            info = await self._add(
                source.model, session_id, request_id, about, source.next_step, snapshot, source.slot
            )
        except Exception as error:  # whatever it is, the source's line must go on
            self._lines.fail(call, error)
        else:
            self._lines.end(call, info)
        self._lines.serve(source)

    async def import_snapshot(self, data: bytes, session_id: str, request_id: str) -> SessionInfo:
        """Make a session from what `export` gave.

        Raises:
            As `create`; InvalidInputError: it is damaged or no state of its model. ModelMismatchError: it comes from
            another model file.
        """
        request = _request("import", hashlib.sha256(data).hexdigest(), session_id)
        if repeated := await self._repeated(request_id, request):
            return repeated
        served, snapshot = self._read_snapshot(data)
        if self.journal.store.keeps_steps:
            data = encode_snapshot(served.model, snapshot.next_step, snapshot.state)
        about = About(
            request,
            served.model.version,
            served.model.digest,
            self.journal.time_s,
            snapshot.next_step,
            zlib.crc32(data),
        )
        return await self._whole(
            self._add(served, session_id, request_id, about, snapshot.next_step, data, state=snapshot.state)
        )

    def _read_snapshot(self, data: bytes) -> tuple[ServedModel, Snapshot]:
        try:
            metadata = snapshot_metadata(data)
            name, digest = metadata["model_name"], metadata["model_digest"]
            version = int(metadata["model_version"])
            served = self.models.get((name, version)) or self.model(name, None)
            alike = [s for (n, _), s in self.models.items() if n == name and s.model.digest == digest]
            alike.sort(key=lambda s: s.is_leaving)
            if not alike:
                raise ModelMismatchError(f"{name}/{version}", digest, served.model.digest)
            snapshot = decode_snapshot(alike[0].model, data)
        except (DamagedError, ValueError) as error:
            raise InvalidInputError(
                "snapshot", f"{error}: send what ExportSession gave, unchanged"
            ) from error
        for tensor, array in snapshot.state.items():
            if not np.isfinite(array).all():
                raise InvalidInputError("snapshot", f"tensor {tensor!r} has values that are not finite")
        return alike[0], snapshot

    async def export(self, session: Session) -> bytes:
        """A session's whole state, as a safetensors file.

        Raises:
            As `step`.
        """
        result = await self.state(session)
        return encode_snapshot(session.model.model, result.next_step, result.state)

    async def _add(
        self,
        served: ServedModel,
        session_id: str,
        request_id: str,
        about: About,
        next_step: int,
        snapshot: bytes = b"",
        slot: int = INITIAL_SLOT,
        state: dict[str, Array] | None = None,
    ) -> SessionInfo:
        """Make a session, in memory if there is room; a repeat of its request gets what that made."""
        if served.is_leaving:
            raise ModelLeavingError(served.model.label)
        if not session_id or session_id.endswith("/"):  # an owner's, without an id
            session_id += secrets.token_hex(16)
        store = self.journal.store
        place = served.room.take()
        if place is None and not store.keeps_steps:
            if repeated := await self._repeated(request_id, about.request):
                return repeated
            raise NoFreeSlotError(served.model.label, served.limits.max_resident_sessions)
        last_use_s = self.journal.service_time_s
        entry = Entry(session_id, served.model.name, request_id, next_step, last_use_s, about.encode())
        if state is not None and store.keeps_steps and place is not None:
            # It comes into memory as any other session does.
            served.room.give_up(place)
            place = None
        write = Write(
            session_id,
            NEW,
            next_step,
            last_use_s,
            entry=entry,
            snapshot=snapshot if store.keeps_steps else b"",
            releases=place is None,
        )
        held = INITIAL_SLOT if place is None else served.slots.hold(slot)
        outcome = await self.journal.committed(write)
        if outcome is not None:
            if place is not None:
                served.slots.release(held)
                served.room.give_up(place)
            return await self._already(outcome, session_id, request_id, about.request)
        if place is None:
            return self._describe_entry(entry)
        session = Session(
            session_id, request_id, served, place, about, FIRST_FENCE, next_step, last_use_s, held
        )
        self._residence.admit(session, state)
        return self.describe(session)

    async def _already(self, outcome: object, session_id: str, request_id: str, request: str) -> SessionInfo:
        """The answer to a creation that the store did not make."""
        if isinstance(outcome, RequestExists):
            return self._same(outcome.entry, request_id, request)
        if isinstance(outcome, EntryExists):
            has_ended = outcome.entry.end_time_s is not None
            raise (SessionIdRetiredError if has_ended else SessionExistsError)(session_id)
        if isinstance(outcome, ServingError):
            raise outcome
        raise SessionMovedError(session_id)

    async def _repeated(self, request_id: str, request: str) -> SessionInfo | None:
        """The session that this request made before, if it did."""
        entry = await self.journal.find_request(request_id) if request_id else None
        return None if entry is None else self._same(entry, request_id, request)

    def _same(self, entry: Entry, request_id: str, request: str) -> SessionInfo:
        """The session that a request made, if it is the same request."""
        try:
            first_request = About.decode(entry.content).request
        except DamagedError:
            first_request = ""
        if first_request != request:
            raise RequestIdReusedError(request_id)
        if entry.end_time_s is not None:
            raise SessionIdRetiredError(entry.session_id)
        session = self.in_memory.get(entry.session_id)
        return self.describe(session) if session else self._describe_entry(entry)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something to its end, whatever becomes of who asked for it."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)
        return task

    def _forget_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited was told

    # Ends.

    async def delete(self, session_id: str, allow_missing: bool) -> None:
        """End a session after the calls that wait on it, and retire its id.

        Raises:
            SessionNotFoundError: unless `allow_missing`. As `step` otherwise.
        """
        try:
            await self._end(session_id)
        except SessionNotFoundError:
            if not allow_missing:
                raise

    async def _end(self, session_id: str) -> None:
        while True:
            session = self.in_memory.get(session_id)
            if session is None and self._residence.is_busy_with(session_id):
                await self._residence.settled(session_id)
            elif session is None:
                await self._residence.end_absent(session_id, "DELETED")
                return
            else:
                try:
                    await self.finish(self._lines.enter(session, self._ending("DELETED")))
                    return
                except (RecoveryError, StoreFullError):
                    log.info("a session that cannot be brought back is deleted", session_id=session_id)

    def _ending(self, reason: Literal["DELETED", "EXPIRED"]) -> Any:
        """How a call begins that ends its session."""

        def begin(call: Call) -> None:
            session = call.session
            loss = (SessionExpiredError if reason == "EXPIRED" else SessionNotFoundError)(session.session_id)
            about = replace(session.about, end_reason=reason)
            self._change(call, about, lambda: self._lines.lose(session, loss), end_time_s=self.journal.time_s)

        return begin

    async def expire_idle(self) -> None:
        """End the sessions that no call has used for the idle limit, if there is one.

        Raises:
            StoreError, LeaseLapsedError.
        """
        limit_s = self._idle_limit_s
        if limit_s is None:
            return
        now_s = self.journal.service_time_s
        for served in self.models.values():
            for session in served.room.idle(now_s - limit_s):
                log.info("session expired", session_id=session.session_id, idle_limit_s=limit_s)
                self._lines.enter(session, self._ending("EXPIRED")).future.add_done_callback(_look_at_error)
        if not self.journal.store.keeps_steps:
            return
        before_s = now_s - limit_s
        for session_id in await self.journal.find_idle(before_s, _IDLE_AT_ONCE):
            if session_id in self.in_memory or self._residence.is_busy_with(session_id):
                continue
            try:
                await self._residence.end_absent(session_id, "EXPIRED", before_s)
                log.info("session expired", session_id=session_id)
            except (SessionNotFoundError, SessionMovedError):
                continue

    async def purge(self) -> None:
        """Forget the sessions that ended long enough ago, so that their ids can be used again.

        Raises:
            StoreError.
        """
        await self.journal.purge(self.journal.time_s - RETIREMENT_S)

    # Looking.

    async def get(self, session_id: str) -> SessionInfo:
        """A session as it is, wherever it is.

        Raises:
            SessionNotFoundError, SessionExpiredError, StoreError, LeaseLapsedError.
        """
        session = self.in_memory.get(session_id)
        if session is not None:
            if not self.journal.holds_lease:
                raise LeaseLapsedError
            return self.describe(session)
        entry = await self.journal.look(session_id)
        if entry is None:
            raise SessionNotFoundError(session_id)
        if entry.end_time_s is not None:
            raise end_error(entry)
        return self._describe_entry(entry)

    async def page(self, after: str, size: int, model_name: str) -> tuple[list[SessionInfo], bool]:
        """Up to `size` sessions with ids after `after`, ascending, and whether there are more.

        Raises:
            StoreError.
        """
        entries = await self.journal.page(after, size + 1, model_name)
        infos = []
        for entry in entries[:size]:
            session = self.in_memory.get(entry.session_id)
            infos.append(self.describe(session) if session else self._describe_entry(entry))
        return infos, len(entries) > size

    def describe(self, session: Session) -> SessionInfo:
        """A session in memory as it is."""
        return self._info(
            session.session_id,
            session.model.model.name,
            session.next_step,
            session.last_use_s,
            session.about,
        )

    def _describe_entry(self, entry: Entry) -> SessionInfo:
        try:
            about = About.decode(entry.content)
        except DamagedError:
            about = About("", 0, "", 0.0, 0)
        return self._info(entry.session_id, entry.model_name, entry.next_step, entry.last_use_s, about)

    def _info(
        self, session_id: str, model_name: str, next_step: int, last_use_s: float, about: About
    ) -> SessionInfo:
        last_use_time_s = self.journal.time_s - (self.journal.service_time_s - last_use_s)
        return SessionInfo(
            session_id,
            model_name,
            about.model_version,
            next_step,
            about.create_time_s,
            last_use_time_s,
            last_use_time_s + self._idle_limit_s if self._idle_limit_s else None,
            about.is_approximate,
        )


def _request(*said: object) -> str:
    """A request that makes a session, so that a repeat is told from another request."""
    return json.dumps(said)


def _version(entry: Entry) -> int | None:
    """The version of its model that a session belongs to; None if that cannot be read, so that it is of no use."""
    try:
        return About.decode(entry.content).model_version
    except DamagedError:
        return None


def _look_at_error(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()
