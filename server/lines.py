"""Lines: one session's calls, in order of arrival, one at a time; each happens whole or not at all, and once.

The engine works in a slot of the message's own. Only what ended well there, and was committed to the store, becomes
the session's state and history and is answered. If it cannot be known what became of a commit, the session is lost to
this server's memory: its calls are told so, and the next one finds it as the store has it.

Everything here runs in the event loop's thread; the engine's and the store's threads only hand back what has ended.
`sessions.py` enters calls, `residence.py` looks after sessions that come and go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import numpy as np

from ntm.tensor import Array
from server.engine import Message
from server.errors import (
    LeaseLapsedError,
    OutputNotFiniteError,
    QueueFullError,
    ServingError,
    SessionMovedError,
    StateNotKeptError,
    StepFailedError,
)
from server.journal import Journal, Outcome
from server.model_runner import INITIAL_SLOT
from server.records import About, Failure, digest_of, encode_record, encode_snapshot
from server.served_model import ServedModel
from server.session import Batch, Call, Group, Session, StepResult
from server.store import Write


class Keeper(Protocol):
    """Who looks after sessions: `residence.py`."""

    def rest(self, session: Session) -> None:
        """No call is left in a session's line."""

    def vacate(self, session: Session) -> None:
        """A session is lost, and nothing uses its slot any more."""

    def lost(self, session: Session) -> None:
        """A session is lost: whoever looks for it must look in the store."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of one session once the store has it."""

    session: Session
    write: Write
    apply: Callable[[], None]
    undo: Callable[[], None] = lambda: None


class Lines:
    """Serves the calls of all sessions."""

    def __init__(self, journal: Journal, snapshot_every_steps: int) -> None:
        """Commit to a journal, with a snapshot whenever a session has run so many steps since the last."""
        self._journal = journal
        self._snapshot_every_steps = snapshot_every_steps
        self._is_durable = journal.store.keeps_steps
        self.keeper: Keeper

    # Entering and leaving.

    def enter(
        self,
        session: Session,
        begin: Callable[[Call], None],
        needs_device: bool = False,
        follows: Call | None = None,
        batch: tuple[Batch, int] | None = None,
        is_our_own: bool = False,
    ) -> Call:
        """Put a call in its session's line.

        A call that neither needs the device nor has to wait for another is never too many, nor is one of our own.

        Raises:
            QueueFullError; SessionMovedError or what else became of the session.
        """
        self._check_is_here(session)
        served = session.model
        must_wait = needs_device or session.calls
        if must_wait and not is_our_own and served.num_pending >= served.limits.max_pending_messages:
            raise queue_full(served)
        served.num_pending += 1
        if batch is None:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            call = Call(session, begin, future, partial(_settle, future), follows)
        else:
            call = batch[0].call(session, begin, batch[1])
        served.room.wake(session)
        session.calls.append(call)
        if len(session.calls) == 1:
            self.serve(session)
        return call

    async def finish(self, waiting: Call | Batch) -> Any:
        """What became of a call, or of each of a batch; whoever is cancelled here withdraws what has not begun.

        Raises:
            What the call raises.
        """
        try:
            return await waiting.future
        except asyncio.CancelledError:
            self.withdraw([waiting] if isinstance(waiting, Call) else waiting.calls)
            raise

    def withdraw(self, calls: Iterable[Call | Group]) -> None:
        """The caller has left: take the calls out that have not begun; the others run to their end."""
        for call in calls:
            if isinstance(call, Group):
                self._withdraw_group(call)
                continue
            if not call.future.cancel() and not call.future.cancelled():
                call.future.exception()  # nobody else will ask, and asyncio would complain
            self._withdraw(call)

    # Serving.

    def serve(self, session: Session) -> None:
        """Begin what can be begun; to be called whenever a session's line or what it waits for has changed."""
        while session.calls and (session.is_ready or session.loss):
            call = session.calls[0]
            if isinstance(call, Group):
                if call.message is not None:
                    return
                if session.loss:
                    self._drop(call, session, session.loss)
                    continue
                call.waiting.discard(session)
                if not call.waiting:
                    self._begin_group(call)
                return
            if call.is_begun:
                return
            if call.future.cancelled() or (call.follows is not None and call.follows.has_failed):
                call.has_failed = True
                self._leave(call)
                continue
            if session.loss:
                self.fail(call, session.loss)
                continue
            call.is_begun = True
            try:
                call.begin(call)
            except Exception as error:  # a bug in one call must not keep the others of its session waiting
                self.fail(call, error)
        if not session.calls:
            if session.loss:
                self.keeper.vacate(session)
            elif session.is_ready:
                self.keeper.rest(session)

    def end(self, call: Call, result: object) -> None:
        """Answer the call being served, unless what this replica knows may be out of date."""
        if not self._journal.holds_lease:
            return self.fail(call, LeaseLapsedError())
        self._leave(call)
        return call.settle(result)

    def fail(self, call: Call, error: Exception) -> None:
        """Answer the call being served with an error."""
        call.has_failed = True
        self._leave(call)
        call.settle(error)

    def lose(self, session: Session, loss: ServingError) -> None:
        """A session is here no more; what is in its line is told why, but what has begun in the engine ends there."""
        if session.loss is None:
            session.loss = loss
            session.model.room.wake(session)
            self.keeper.lost(session)

    def commit(self, changes: Sequence[Change], then: Callable[[list[ServingError | None]], None]) -> None:
        """Commit changes, then make them part of their sessions; `then` is told what became of each.

        A session whose change was not committed is lost.
        """

        def committed(outcomes: list[Outcome]) -> None:
            errors: list[ServingError | None] = []
            for change, outcome in zip(changes, outcomes, strict=True):
                session = change.session
                if outcome is not None:
                    self.lose(session, loss_by(outcome, session.session_id))
                errors.append(session.loss)
                if session.loss:
                    change.undo()
                else:
                    change.apply()
            then(errors)

        self._journal.commit([change.write for change in changes], committed)

    # Messages.

    def step(
        self,
        session: Session,
        inputs: Array,
        first_step: int | None,
        wants_state: bool = False,
        follows: Call | None = None,
        batch: tuple[Batch, int] | None = None,
    ) -> Call:
        """As `SessionManager.step`."""
        begin = self._stepping(inputs, first_step, wants_state)
        return self.enter(session, begin, needs_device=True, follows=follows, batch=batch)

    def step_each(
        self, sessions: Sequence[Session | ServingError | None], inputs: Array, first_steps: Sequence[int]
    ) -> Batch:
        """As `SessionManager.step_each`; those that are None enter later, by `step_alone`."""
        batch = Batch(len(sessions), inputs.shape[1])
        together: dict[tuple[ServedModel, Group | None], list[int]] = {}
        for index, session in enumerate(sessions):
            if session is None:
                continue
            if isinstance(session, ServingError):
                batch.settle(index, session)
                continue
            served, last = session.model, session.calls[-1] if session.calls else None
            if isinstance(last, Call) or not session.is_ready or session.loss or session.is_leaving:
                self.step_alone(batch, index, session, inputs, first_steps)
            elif served.num_pending >= served.limits.max_pending_messages:
                batch.settle(index, queue_full(served))
            else:
                served.num_pending += 1
                together.setdefault((served, last), []).append(index)
        for (served, _), indices in together.items():
            size = served.runner.max_batch_size
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                group = Group(
                    batch,
                    served,
                    part,
                    [cast(Session, sessions[index]) for index in part],
                    inputs[part],
                    [first_steps[index] for index in part] if first_steps else (),
                )
                self._enter_group(group)
        return batch

    def look(self, call: Call, then: Callable[[dict[str, Array]], None]) -> None:
        """Read the state of the session whose call is being served: a message of no steps."""
        session = call.session

        def on_ended(message: Message) -> None:
            error = session.loss or message.errors.get(0)
            if error is not None:
                self.fail(call, error)
            else:
                assert message.state is not None
                then({name: values[0] for name, values in message.state.items()})
            self.serve(session)

        model = session.model.model
        call.message = Message(
            [session.session_id],
            [session.next_step],
            model.no_inputs[np.newaxis],
            model.no_outputs[np.newaxis],
            [session.slot],
            [INITIAL_SLOT],
            session.model.slots.shared([session.slot]),
            wants_state=True,
            on_ended=on_ended,
        )
        session.model.submit(call.message)

    def _stepping(
        self, inputs: Array, first_step: int | None, wants_state: bool = False
    ) -> Callable[[Call], None]:
        """How a call begins that runs some steps, or answers them from the records."""

        def begin(call: Call) -> None:
            session = call.session
            known = session.history.outputs_of(inputs, first_step)
            new_inputs = inputs[len(known) :]
            if len(new_inputs):
                if first_step is not None and not len(known):
                    _check_has_not_failed(session, inputs)
                return self._run(call, new_inputs, known, wants_state)
            end_step = (first_step or 0) + len(inputs)
            if not wants_state:
                return self.end(call, StepResult(known, end_step, {}))
            if end_step != session.next_step or session.history.was_reset_at(end_step):
                raise StateNotKeptError(end_step - 1, session.next_step)
            return self.look(call, lambda state: self.end(call, StepResult(known, end_step, state)))

        return begin

    def _run(self, call: Call, inputs: Array, known_outputs: Array, wants_state: bool) -> None:
        """Send a message for the call; its answer is the outputs known and the new ones."""
        session, served = call.session, call.session.model
        no_outputs = served.model.no_outputs
        outputs = np.empty((len(inputs), *no_outputs.shape[1:]), no_outputs.dtype)
        slot = served.slots.take()
        is_due = self._is_snapshot_due(session, len(inputs))

        def on_ended(message: Message) -> None:
            error = session.loss or message.errors.get(0)
            state = {name: values[0] for name, values in (message.state or {}).items()}
            if error is not None:
                served.slots.release(slot)
                self._settle_failure(session, inputs, error, lambda: self.fail(call, error))
            else:
                change = self._stepped(session, slot, inputs, outputs, state if is_due else None)
                self._settle_steps([change], partial(committed, state))
            self.serve(session)

        def committed(state: dict[str, Array], errors: list[ServingError | None]) -> None:
            if errors[0] is not None:
                self.fail(call, errors[0])
            else:
                joined = np.concatenate([known_outputs, outputs]) if len(known_outputs) else outputs
                self.end(call, StepResult(joined, session.next_step, state if wants_state else {}))
            self.serve(session)

        call.message = Message(
            [session.session_id],
            [session.next_step],
            inputs[np.newaxis],
            outputs[np.newaxis],
            [session.slot],
            [slot],
            served.slots.shared([session.slot]),
            wants_state=wants_state or is_due,
            on_ended=on_ended,
        )
        served.submit(call.message)

    def _is_snapshot_due(self, session: Session, num_steps: int) -> bool:
        since = session.next_step + num_steps - session.about.snapshot_step
        return self._is_durable and since >= self._snapshot_every_steps

    def _stepped(
        self, session: Session, slot: int, inputs: Array, outputs: Array, state: dict[str, Array] | None
    ) -> Change:
        """Steps that ended well, their end state in a slot; with the state, if that is to be a snapshot."""
        about, first_step, last_use_s = session.about, session.next_step, self._journal.service_time_s

        def apply() -> None:
            session.about, session.last_use_s = about, last_use_s
            move(session, slot)
            session.history.add(inputs, outputs)

        def undo() -> None:
            session.model.slots.release(slot)

        next_step = first_step + len(inputs)
        if not self._is_durable:
            return Change(
                session, Write(session.session_id, session.fence, next_step, last_use_s), apply, undo
            )
        where = session.model.fingerprint
        record = encode_record(session.session_id, first_step, inputs, outputs, where.digest)
        snapshot, forget_before = None, None
        if state is not None:
            snapshot = encode_snapshot(session.model.model, next_step, state)
            forget_before = max(0, next_step - session.model.limits.retry_window_steps)
            about = replace(about, snapshot_step=next_step, reset_steps=session.history.reset_steps)
        if about.fingerprint != where.text:
            about = replace(about, fingerprint=where.text)
        entry = None if about is session.about else session.entry(about, next_step, last_use_s)
        write = Write(
            session.session_id, session.fence, next_step, last_use_s, record, entry, snapshot, forget_before
        )
        return Change(session, write, apply, undo)

    def _settle_steps(
        self, changes: Sequence[Change], then: Callable[[list[ServingError | None]], None]
    ) -> None:
        """Commit steps, if the store keeps them."""
        if self._is_durable:
            return self.commit(changes, then)
        for change in changes:
            change.apply()
        return then([None] * len(changes))

    def _settle_failure(
        self, session: Session, inputs: Array, error: ServingError, then: Callable[[], None]
    ) -> None:
        """Note that a message has failed by its inputs, so that a repeat gets the same answer; then go on."""
        if session.loss or type(error) not in (StepFailedError, OutputNotFiniteError):
            return then()
        step = error.step if isinstance(error, OutputNotFiniteError) else -1
        kind = "OUTPUT_NOT_FINITE" if isinstance(error, OutputNotFiniteError) else "STEP_FAILED"
        failure = Failure(session.next_step, digest_of(inputs), kind, step)  # type: ignore[arg-type]
        change = self.change(session, replace(session.about, failure=failure))

        def committed(_errors: list[ServingError | None]) -> None:
            then()
            self.serve(session)

        return self.commit([change], committed)

    def change(
        self,
        session: Session,
        about: About,
        apply: Callable[[], None] = lambda: None,
        snapshot: bytes | None = None,
        end_time_s: float | None = None,
        releases: bool = False,
        last_use_s: float | None = None,
    ) -> Change:
        """A change of a session that runs no step; by default it counts as a use."""
        if last_use_s is None:
            last_use_s = self._journal.service_time_s

        def apply_all() -> None:
            session.about, session.last_use_s = about, last_use_s
            apply()

        write = Write(
            session.session_id,
            session.fence,
            session.next_step,
            last_use_s,
            entry=session.entry(about, session.next_step, last_use_s, end_time_s),
            snapshot=snapshot,
            forget_before=None
            if snapshot is None
            else max(0, session.next_step - session.model.limits.retry_window_steps),
            releases=releases,
        )
        return Change(session, write, apply_all)

    # Messages of many sessions.

    def step_alone(
        self,
        batch: Batch,
        index: int,
        session: Session,
        inputs: Array,
        first_steps: Sequence[int],
    ) -> None:
        """Enter a call for one session of a batch, behind other calls."""
        try:
            self.step(
                session, inputs[index], first_steps[index] if first_steps else None, batch=(batch, index)
            )
        except ServingError as error:
            batch.settle(index, error)

    def _enter_group(self, group: Group) -> None:
        group.batch.calls.append(group)
        for session in group.sessions:
            if session.calls:
                group.waiting.add(session)
            else:
                group.served.room.wake(session)
            session.calls.append(group)
        if not group.waiting:
            self._begin_group(group)

    def _begin_group(self, group: Group) -> None:
        """Send a group's message; a session that is not where the steps begin is served by itself."""
        elsewhere = [
            row
            for row, (session, first_step) in enumerate(zip(group.sessions, group.first_steps, strict=False))
            if first_step != session.next_step or session.has_just_failed
        ]
        others = self._split_off(group, elsewhere) if elsewhere else []
        if group.sessions:
            self._run_group(group)
        else:
            group.batch.calls.remove(group)
        for session in others:
            self.serve(session)

    def _split_off(self, group: Group, rows: list[int]) -> list[Session]:
        """Put calls of their own in the place of the group for some of its sessions; returns these."""
        apart = set(rows)
        for row in rows:
            first_step = group.first_steps[row] if group.first_steps else None
            session, begin = group.sessions[row], self._stepping(group.inputs[row], first_step)
            session.calls[0] = group.batch.call(session, begin, group.indices[row])
        others = [group.sessions[row] for row in rows]
        group.keep([row for row in range(len(group.sessions)) if row not in apart])
        return others

    def _drop(self, group: Group, session: Session, error: ServingError) -> None:
        """Take a session that is lost out of a group that has not begun."""
        row = group.sessions.index(session)
        index = group.indices[row]
        session.calls.popleft()
        group.served.num_pending -= 1
        group.waiting.discard(session)
        group.keep([other for other in range(len(group.sessions)) if other != row])
        group.batch.settle(index, error)
        if not group.sessions:
            group.batch.calls.remove(group)
        elif not group.waiting:
            self._begin_group(group)

    def _run_group(self, group: Group) -> None:
        served, sessions, inputs = group.served, group.sessions, group.inputs
        no_outputs = served.model.no_outputs
        outputs = np.empty((*inputs.shape[:2], *no_outputs.shape[1:]), no_outputs.dtype)
        slots = [served.slots.take() for _ in sessions]
        num_steps = inputs.shape[1]
        are_due = [self._is_snapshot_due(session, num_steps) for session in sessions]

        def on_ended(message: Message) -> None:
            errors = dict(message.errors)
            changes, rows = [], []
            for row, session in enumerate(sessions):
                if session.loss:
                    errors[row] = session.loss
                if row in errors:
                    served.slots.release(slots[row])
                    continue
                state = None
                if are_due[row] and message.state is not None:
                    state = {name: values[row] for name, values in message.state.items()}
                changes.append(self._stepped(session, slots[row], inputs[row], outputs[row], state))
                rows.append(row)
            failing = [
                partial(self._settle_failure, sessions[row], inputs[row], error)
                for row, error in errors.items()
            ]
            self._settle_steps(changes, partial(committed, rows, errors, failing))

        def committed(
            rows: list[int],
            errors: dict[int, ServingError],
            failing: Sequence[Callable[[Callable[[], None]], None]],
            outcomes: list[ServingError | None],
        ) -> None:
            errors |= {row: error for row, error in zip(rows, outcomes, strict=True) if error is not None}
            num_left = len(failing)

            def settle() -> None:
                nonlocal num_left
                num_left -= 1
                if num_left < 0:
                    self._answer_group(group, outputs, errors)

            for settle_failure in failing:
                settle_failure(settle)
            settle()

        group.message = Message(
            [session.session_id for session in sessions],
            [session.next_step for session in sessions],
            inputs,
            outputs,
            present := [session.slot for session in sessions],
            slots,
            served.slots.shared(present),
            wants_state=any(are_due),
            on_ended=on_ended,
        )
        served.submit(group.message)

    def _answer_group(self, group: Group, outputs: Array, errors: dict[int, ServingError]) -> None:
        if not self._journal.holds_lease:
            errors = dict.fromkeys(range(len(group.sessions)), LeaseLapsedError())
        group.batch.settle_group(group, outputs, errors)
        # Only now, since whose turn it is next sees what has become of the session.
        self._disband(group)

    def _disband(self, group: Group) -> None:
        """The message of a group has ended or is withdrawn: it is the turn of who waits behind it."""
        group.served.num_pending -= len(group.sessions)
        for session in group.sessions:
            session.calls.popleft()
            self.serve(session)

    # Leaving.

    def _leave(self, call: Call) -> None:
        session = call.session
        session.calls.popleft()
        call.follows = None  # or a stream would keep all its calls alive
        session.last_use_s = self._journal.service_time_s
        session.model.num_pending -= 1

    def _withdraw(self, call: Call) -> None:
        session = call.session
        if call not in session.calls:
            return
        if not call.is_begun:
            session.calls.remove(call)
            session.model.num_pending -= 1
            self.serve(session)
        elif call.message is not None and session.model.withdraw(call.message):
            session.model.slots.release(call.message.write_slots[0])
            self._leave(call)
            self.serve(session)

    def _withdraw_group(self, group: Group) -> None:
        if group.message is None:
            behind = [session for session in group.sessions if session.calls[0] is group]
            group.served.num_pending -= len(group.sessions)
            for session in group.sessions:
                session.calls.remove(group)
            for session in behind:
                self.serve(session)
        elif not group.message.has_ended and group.served.withdraw(group.message):
            for slot in group.message.write_slots:
                group.served.slots.release(slot)
            self._disband(group)

    def _check_is_here(self, session: Session) -> None:
        if session.loss:
            raise session.loss
        if session.is_leaving:
            raise SessionMovedError(session.session_id)


def move(session: Session, slot: int) -> None:
    """Let a session's state be in another slot."""
    session.model.slots.release(session.slot)
    session.slot = slot


def loss_by(outcome: Outcome, session_id: str) -> ServingError:
    """What callers are told of a change that was not committed."""
    return outcome if isinstance(outcome, ServingError) else SessionMovedError(session_id)


def queue_full(served: ServedModel) -> QueueFullError:
    """Too many messages wait for a model."""
    return QueueFullError(served.model.label, served.limits.max_pending_messages)


def _check_has_not_failed(session: Session, inputs: Array) -> None:
    """That a numbered message is not one that has failed already."""
    failure = session.about.failure
    if failure is not None and session.has_just_failed and failure.inputs_digest == digest_of(inputs):
        label = session.model.model.label
        if failure.kind == "STEP_FAILED":
            raise StepFailedError(label)
        raise OutputNotFiniteError(label, failure.step)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
