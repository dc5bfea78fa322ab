"""Residence: which sessions are in memory, and how they come in and go out.

A session that is not in memory is brought in by its next call: this replica claims it, puts its snapshot into a slot
and replays the records since, as messages of the engine like any other, so that many come back at once. Outputs must
be those on record then, bit for bit. When there is no room, the session that was idle longest goes out to the store;
one that has work in line never does. Another replica that needs a session asks for it and is given it after the calls
in line.

Without a store that keeps steps, a session is in memory from its creation to its end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, Literal

import numpy as np
import structlog

from ntm.tensor import Array
from server.engine.request import Message
from server.errors import (
    EngineFailedError,
    LeaseLapsedError,
    ModelMismatchError,
    ModelNotLoadedError,
    QueueFullError,
    RecoveryError,
    RecoveryNotExactError,
    ServingError,
    SessionCorruptError,
    SessionExpiredError,
    SessionMovedError,
    SessionNotFoundError,
    SessionQuarantinedError,
    StoreError,
    WrongReplicaError,
)
from server.runtime.runner import INITIAL_SLOT, Rows
from server.sessions.executor import Steps
from server.sessions.queues import Lines, loss_by, move
from server.sessions.served_model import ServedModel
from server.sessions.session import Call, Session
from server.storage.codec import (
    About,
    DamagedError,
    Ran,
    check_unbroken,
    decode_record,
    decode_snapshot,
    encode_snapshot,
)
from server.storage.commit_writer import CommitWriter
from server.storage.interface import Claim, Entry, OwnedElsewhere, Write

log = structlog.get_logger()

_MOST_RECOVERIES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.05

FindModel = Callable[[str, int], ServedModel | None]


class Residence:
    """The sessions in memory."""

    def __init__(
        self,
        journal: CommitWriter,
        lines: Lines,
        steps: Steps,
        find_model: FindModel,
        recovery: Literal["exact", "approximate"],
        handover_timeout_s: float,
    ) -> None:
        """Nobody is in memory.

        Args:
            journal: the store.
            lines: serves the sessions' calls.
            steps: reads their state.
            find_model: a model in service, by name and version.
            recovery: whether a session may be replayed on another machine or build than it ran on.
            handover_timeout_s: seconds to wait for a session that another replica owns.
        """
        self.sessions: dict[str, Session] = {}
        self._journal = journal
        self._lines = lines
        self._steps = steps
        self._find_model = find_model
        self._recovery = recovery
        self._handover_timeout_s = handover_timeout_s
        self._under_way: dict[str, asyncio.Task[None]] = {}
        """What is being done about sessions that are not in memory."""
        self._wanted: Counter[str] = Counter()
        """Sessions that somebody waits for, who will then enter a call."""
        self._restoring: set[asyncio.Task[None]] = set()
        self._epoch = 0
        """Counts the times that this replica's lease has run out: a claim of an earlier time is worth nothing."""
        lines.keeper = self
        journal.watch(self.drop_all, self.hand_over)

    # Bringing sessions in.

    async def find(self, session_id: str) -> Session:
        """A session, brought into memory if it is not there; its calls may enter while its state is on its way.

        Raises:
            SessionNotFoundError, SessionExpiredError, SessionMovedError, ModelNotLoadedError, ModelMismatchError,
            RecoveryError, QueueFullError, StoreError, LeaseLapsedError.
        """
        while (session := self.sessions.get(session_id)) is None:
            self._wanted[session_id] += 1
            try:
                await self._alone(session_id, lambda: self._bring_in(session_id))
            finally:
                self._wanted[session_id] -= 1
                if not self._wanted[session_id]:
                    del self._wanted[session_id]
        if session.first_call is None:
            # A call is about to enter. If none does, it is idle after all.
            asyncio.get_running_loop().call_soon(self._lines.serve, session)
        return session

    def begin_to_find(self, session_ids: Sequence[str]) -> None:
        """Claim sessions together, for whoever calls `find` next; none that a live replica owns is waited for.

        `find` raises WrongReplicaError for those.
        """
        missing = [i for i in session_ids if i not in self.sessions and i not in self._under_way]
        if not missing:
            return
        epoch, claiming = self._epoch, asyncio.ensure_future(self._journal.claim(missing))
        claiming.add_done_callback(_look_at_error)

        async def bring_in(index: int) -> None:
            found = (await claiming)[index]
            if isinstance(found, OwnedElsewhere):
                raise WrongReplicaError(missing[index], found.owner)
            await self._admit_claim(missing[index], found, epoch)

        for index, session_id in enumerate(missing):
            self._begin(session_id, partial(bring_in, index))

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
            claim = await self._claim(session_id)
            if claim.entry.last_use_s >= last_use_before_s:
                return
            try:
                about = replace(About.decode(claim.entry.content), end_reason=reason)
            except DamagedError:
                about = About("", 0, "", 0.0, 0, end_reason=reason)
            entry = replace(claim.entry, content=about.encode(), end_time_s=self._journal.time_s)
            write = Write(session_id, claim.fence, entry.next_step, entry.last_use_s, entry=entry)
            outcome = await self._journal.committed(write)
            if outcome is not None:
                raise loss_by(outcome, session_id)

        await self._alone(session_id, end)

    def admit(self, session: Session, state: dict[str, Array] | None = None) -> None:
        """A session that was just made, in a place taken for it; with a state that is to be put into its slot."""
        self.sessions[session.session_id] = session
        session.is_ready = state is None
        if state is None:
            self.rest(session.model, session.place)
        else:
            self._spawn(self._restore(session, [], state))

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

        task = self._under_way[session_id] = asyncio.create_task(do())
        task.add_done_callback(_look_at_error)
        return task

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._restoring.add(task)
        task.add_done_callback(self._restoring.discard)

    async def _bring_in(self, session_id: str) -> None:
        epoch = self._epoch
        await self._admit_claim(session_id, await self._claim(session_id), epoch)

    async def _claim(self, session_id: str) -> Claim:
        """Claim a session, from another live replica if need be: that one is asked until it has released it."""
        deadline_s, pause_s = monotonic() + self._handover_timeout_s, _FIRST_PAUSE_S
        while True:
            (found,) = await self._journal.claim([session_id])
            if not isinstance(found, OwnedElsewhere):
                return _check_lives(session_id, found)
            if monotonic() > deadline_s:
                raise SessionMovedError(session_id)
            await self._journal.ask_for(session_id, found.owner)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _admit_claim(self, session_id: str, found: Claim | Entry | None, epoch: int) -> None:
        """Make a claim of an epoch a session in memory, and begin to bring its state back."""
        claim = _check_lives(session_id, found)
        about, served = self._read_entry(claim.entry)
        place = served.room.take()
        if place is None:
            place = await self._wait_for_room(served)
        if epoch != self._epoch:
            served.room.give_up(place)
            raise LeaseLapsedError
        entry = claim.entry
        session = Session(
            session_id, entry.request_id, served, place, about, claim.fence, entry.next_step, entry.last_use_s
        )
        self.sessions[session_id] = session
        try:
            replay, state = self._read_claim(session, claim)
        except ServingError as error:
            self._lines.lose(session, error)
            self._lines.serve(session)
            raise
        if replay or state is not None:
            session.is_ready = False
            self._spawn(self._restore(session, replay, state))
        else:
            self._lines.serve(session)

    def _read_entry(self, entry: Entry) -> tuple[About, ServedModel]:
        """What an entry says of its session, and the model, if it is served here."""
        try:
            about = About.decode(entry.content)
        except DamagedError as error:
            raise SessionCorruptError(entry.session_id, str(error)) from error
        served = self._find_model(entry.model_name, about.model_version)
        label = f"{entry.model_name}/{about.model_version}"
        if served is None:
            raise ModelNotLoadedError(entry.session_id, label)
        if served.model.digest != about.model_digest:
            raise ModelMismatchError(label, about.model_digest, served.model.digest)
        return about, served

    def _read_claim(self, session: Session, claim: Claim) -> tuple[list[Ran], dict[str, Array] | None]:
        """What is to be replayed, and from which state (None: the initial one); fills the session's history."""
        model, about = session.model.model, session.about
        try:
            ran = [decode_record(session.session_id, record, model) for record in claim.records]
            check_unbroken(ran, about.snapshot_step, claim.entry.next_step)
            about.check_snapshot(claim.snapshot)
            state = None
            if claim.snapshot:
                snapshot = decode_snapshot(model, claim.snapshot)
                if (snapshot.next_step, snapshot.metadata["model_digest"]) != (
                    about.snapshot_step,
                    model.digest,
                ):
                    raise DamagedError("the snapshot is of another step or model")
                state = snapshot.state
        except DamagedError as error:
            log.error("a session is damaged", session_id=session.session_id, problem=str(error))
            raise SessionCorruptError(session.session_id, str(error)) from error
        replay = [message for message in ran if message.first_step >= about.snapshot_step]
        here = session.model.fingerprint
        if any(message.fingerprint != here.digest for message in replay):
            if self._recovery == "exact":
                raise RecoveryNotExactError(session.session_id, about.fingerprint, here.text)
            session.about = replace(about, is_approximate=True)
        if replay and about.num_recoveries >= _MOST_RECOVERIES:
            raise SessionQuarantinedError(session.session_id, about.num_recoveries)
        _record(session, ran)
        return replay, state

    async def _restore(self, session: Session, replay: list[Ran], state: dict[str, Array] | None) -> None:
        """Put the state back, replay what came after it, and begin to serve the session's calls."""
        try:
            if replay:
                await self._note_attempt(session)
            message = await self._run_replay(session, replay, state)
            if replay:
                await self._note_recovery(session, message)
        except ServingError as error:
            if isinstance(error, RecoveryError):
                log.error(
                    "a session cannot be brought back", session_id=session.session_id, problem=str(error)
                )
            self._lines.lose(session, error)
        except Exception as error:  # nobody is left waiting
            log.error("a session could not be brought back", session_id=session.session_id, exc_info=error)
            self._lines.lose(session, EngineFailedError(session.model.model.label))
        session.is_ready = True
        self._lines.serve(session)

    async def _run_replay(
        self, session: Session, replay: list[Ran], state: dict[str, Array] | None
    ) -> Message:
        served, model = session.model, session.model.model
        inputs = np.concatenate([model.no_inputs, *(message.inputs for message in replay)])
        outputs = np.empty((len(inputs), *model.no_outputs.shape[1:]), model.no_outputs.dtype)
        source = INITIAL_SLOT if state is None else served.slots.take()
        target = served.slots.take() if replay else source
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        message = Message(
            [session.session_id],
            [session.next_step - len(inputs)],
            inputs[np.newaxis],
            outputs[np.newaxis],
            [source],
            [target],
            load_state=None if state is None else {n: a[np.newaxis] for n, a in state.items()},
            wants_state=bool(replay),
            on_ended=lambda _: ended.set_result(None),
        )
        served.submit(message)
        await ended
        if replay:
            served.slots.release(source)
        if session.loss:
            served.slots.release(target)
            raise session.loss
        move(session, target)
        if message.errors:
            error = message.errors[0]
            if isinstance(error, EngineFailedError):
                raise error
            raise SessionCorruptError(session.session_id, f"its steps cannot be run again: {error}")
        recorded = np.concatenate([model.no_outputs, *(ran.outputs for ran in replay)])
        if not session.about.is_approximate and recorded.tobytes() != outputs.tobytes():
            raise SessionCorruptError(session.session_id, "its steps, run again, gave other outputs")
        return message

    async def _note_attempt(self, session: Session) -> None:
        about = replace(session.about, num_recoveries=session.about.num_recoveries + 1)
        await self._commit(session, about)

    async def _note_recovery(self, session: Session, message: Message) -> None:
        """What was replayed once need not be again."""
        assert message.state is not None
        state = {name: values[0] for name, values in message.state.items()}
        snapshot = encode_snapshot(session.model.model, session.next_step, state)
        try:
            await self._commit(session, _with_snapshot(session, snapshot), snapshot)
        except StoreError:
            # The replay was sound: nobody is to be quarantined because a store has no room.
            sound = replace(session.about, num_recoveries=0)
            change = self._lines.change(session, sound, last_use_s=session.last_use_s)
            await self._journal.committed(change.write)
            raise

    async def _commit(self, session: Session, about: About, snapshot: bytes | None = None) -> None:
        """Commit a change of a session that is being brought back, without counting it as a use."""
        done: asyncio.Future[ServingError | None] = asyncio.get_running_loop().create_future()
        change = self._lines.change(session, about, snapshot=snapshot, last_use_s=session.last_use_s)
        self._lines.commit([change], lambda errors: done.set_result(errors[0]))
        error = await done
        if error is not None:
            raise error

    # Room.

    async def _wait_for_room(self, served: ServedModel) -> int:
        if served.room.num_waiting >= served.limits.max_pending_messages:
            raise QueueFullError(served.model.label, served.limits.max_pending_messages)
        place = served.room.line_up()
        self._make_room(served)
        return await place

    def _make_room(self, served: ServedModel) -> None:
        while (session := served.room.next_to_leave()) is not None:
            self.page_out(session)

    def page_out(self, session: Session) -> Call:
        """Take a session out of memory, after the calls in its line, unless others come in the meantime."""
        served = session.model
        call = self._lines.enter(session, self._begin_to_leave, is_our_own=True)
        served.room.begins_to_leave()

        def has_left(done: asyncio.Future[None]) -> None:
            _look_at_error(done)
            served.room.has_left()
            self._make_room(served)

        call.future.add_done_callback(has_left)
        return call

    def _begin_to_leave(self, call: Call) -> None:
        session = call.session
        if session.about.snapshot_step == session.next_step:
            return self._write_out(call, session.about, None)

        def looked(state: dict[str, Array]) -> None:
            snapshot = encode_snapshot(session.model.model, session.next_step, state)
            self._write_out(call, _with_snapshot(session, snapshot), snapshot)

        return self._steps.look(call, looked)

    def _write_out(self, call: Call, about: About, snapshot: bytes | None) -> None:
        session = call.session
        change = self._lines.change(
            session, about, snapshot=snapshot, releases=True, last_use_s=session.last_use_s
        )

        def committed(errors: list[ServingError | None]) -> None:
            if errors[0] is not None:
                self._lines.fail(call, errors[0])
            elif not session.waiting or session.is_leaving:
                self._lines.lose(session, SessionMovedError(session.session_id))
                self._lines.end(call, None)
            else:
                # Somebody came in the meantime, so it stays.
                session.is_ready = False
                self._spawn(self._take_back(session, change.write))
                self._lines.end(call, None)
            self._lines.serve(session)

        self._lines.commit([change], committed)

    async def _take_back(self, session: Session, written: Write) -> None:
        """Claim a session again that was written out while calls came for it."""
        try:
            claim = await self._claim(session.session_id)
            assert written.entry is not None
            if (claim.entry.next_step, claim.entry.content) != (written.next_step, written.entry.content):
                raise SessionMovedError(session.session_id)  # somebody else has had it
            session.fence = claim.fence
        except ServingError as error:
            self._lines.lose(session, error)
        session.is_ready = True
        self._lines.serve(session)

    # What lines tell.

    def rest(self, served: ServedModel, places: int | Rows) -> None:
        """No call is left in the lines of the sessions in some places, or one, of a model's room."""
        room = served.room
        if self._wanted:  # a call may be on its way to some of them
            those = np.atleast_1d(places).tolist()
            places = np.array([p for p in those if room.session[p].session_id not in self._wanted], np.int64)
        room.is_idle.each[places] = True
        if room.num_waiting:
            self._make_room(served)

    def lost(self, session: Session) -> None:
        """A session is here no more."""
        if self.sessions.get(session.session_id) is session:
            del self.sessions[session.session_id]

    def vacate(self, session: Session) -> None:
        """Nothing uses a lost session's place any more."""
        session.give_up_place()

    # Several replicas.

    def hand_over(self, session_ids: Sequence[str]) -> None:
        """Give sessions to other replicas that ask for them, after the calls in their lines."""
        for session_id in session_ids:
            session = self.sessions.get(session_id)
            if session is not None:
                if not session.is_leaving:
                    self._leave_for_another(session)
            elif session_id not in self._under_way:
                task = asyncio.ensure_future(self._journal.release(session_id))
                task.add_done_callback(_look_at_error)

    def _leave_for_another(self, session: Session) -> Call:
        call = self.page_out(session)
        session.is_leaving = True

        def has_left(_: asyncio.Future[None]) -> None:
            if session.loss is None:  # its state could not be read: it stays, and can be asked for again
                session.is_leaving = False

        call.future.add_done_callback(has_left)
        return call

    def drop_all(self) -> None:
        """Other replicas may have taken these sessions over: forget what is known of them."""
        self._epoch += 1
        for session in [*self.sessions.values()]:
            self._lines.lose(session, LeaseLapsedError())
            self._lines.serve(session)

    def release_model(self, served: ServedModel) -> None:
        """Give the sessions of one model that are in memory to the store, after the calls in their lines."""
        for session in [*self.sessions.values()]:
            if session.model is served and not session.is_leaving:
                self._leave_for_another(session)

    async def release_all(self, timeout_s: float) -> bool:
        """Give every session back to the store, so that whoever comes next finds snapshots and no records behind.

        Says whether all were given back in time; the others are found as the store has them.
        """
        calls = [
            self._leave_for_another(session)
            for session in [*self.sessions.values()]
            if not session.is_leaving
        ]
        waiting = {*(call.future for call in calls), *self._restoring}
        if not waiting:
            return True
        _, late = await asyncio.wait(waiting, timeout=timeout_s)
        return not late


def _with_snapshot(session: Session, snapshot: bytes) -> About:
    """What is to be said of a session whose present state is written as its snapshot."""
    served = session.model
    resets = served.histories.reset_steps(session.place)
    return session.about.with_snapshot(snapshot, session.next_step, resets, served.fingerprint)


def _check_lives(session_id: str, found: Claim | Entry | None) -> Claim:
    if found is None:
        raise SessionNotFoundError(session_id)
    if isinstance(found, Entry):
        raise end_error(found)
    return found


def end_error(entry: Entry) -> SessionNotFoundError:
    """What callers of a session that has ended are told."""
    try:
        has_expired = About.decode(entry.content).end_reason == "EXPIRED"
    except DamagedError:
        has_expired = False
    return (SessionExpiredError if has_expired else SessionNotFoundError)(entry.session_id)


def _record(session: Session, ran: Sequence[Ran]) -> None:
    """Put what a session ran on record, as many of its last steps as the window has."""
    served, model = session.model, session.model.model
    window = served.limits.retry_window_steps
    inputs = np.concatenate([model.no_inputs, *(message.inputs for message in ran)])[-window:]
    outputs = np.concatenate([model.no_outputs, *(message.outputs for message in ran)])[-window:]
    served.histories.begin(session.place, session.next_step - len(inputs), session.about.reset_steps)
    served.histories.add(session.place, inputs, outputs)


def _look_at_error(done: asyncio.Future[Any]) -> None:
    """Whoever waited was told; asyncio would complain if nobody had waited."""
    if not done.cancelled():
        done.exception()
