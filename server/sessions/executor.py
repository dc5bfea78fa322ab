"""Steps: messages of inputs, for one session or for many, from their line through the engine into the store.

The engine works in a slot of the message's own. Only what ended well there, and was committed to the store, becomes the
session's state and history, and is answered. A message that repeats one is answered from the session's history.

`lines.py` says whose turn it is; `engine.py` runs the messages.

Shapes: S sessions of a batch, T steps of a message.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ntm.tensor import Array
from server.engine.request import Message
from server.errors import (
    LeaseLapsedError,
    OutputNotFiniteError,
    ServingError,
    StateNotKeptError,
    StepFailedError,
)
from server.runtime.runner import INITIAL_SLOT, Rows
from server.sessions.queues import Change, Lines, move, queue_full
from server.sessions.served_model import ServedModel
from server.sessions.session import Batch, Call, CallsTogether, Company, Group, Session, StepResult
from server.sessions.watching import Frame
from server.storage.codec import Failure, digest_of, encode_record, encode_snapshot
from server.storage.commit_writer import CommitWriter
from server.storage.interface import Write

# Calls whose turn comes at once share a message, since most of what one costs it costs once; below a few, what arrays
# cost is more. A message runs in one piece, and many small ones fill a batch better than few large ones.
_FEWEST_CALLS = 4
_MOST_CALLS = 32

_Answer = Callable[[Array, Mapping[int, ServingError], Mapping[str, Array]], None]
"""What to do with outputs [S, T, ...], errors by row, and the state [S, ...] each if it was asked for."""


_Kind = tuple[ServedModel, int, bool, bool]
"""A model, a number of steps, whether the state is wanted, and whether a snapshot is due."""


class _Begun(NamedTuple):
    """A call whose turn has come, and the steps of it that have to run."""

    call: Call
    inputs: Array
    known_outputs: Array
    wants_state: bool
    is_due: bool
    """The state after these steps is to be a snapshot, for which that of all in its message is read."""

    @property
    def kind(self) -> _Kind:
        """In what calls must be alike that share a message."""
        return self.call.session.model, len(self.inputs), self.wants_state, self.is_due


class Steps:
    """Runs messages."""

    def __init__(self, lines: Lines, journal: CommitWriter, snapshot_every_steps: int) -> None:
        """Commit to a journal, with a snapshot whenever a session has run so many steps since the last."""
        self._lines = lines
        self._journal = journal
        self._snapshot_every_steps = snapshot_every_steps
        self._is_durable = journal.store.keeps_steps
        self._watching = lines.watching
        self._begun: list[_Begun] = []
        """Calls whose turn came in this turn of the event loop."""

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
        return self._lines.enter(session, begin, needs_device=True, follows=follows, batch=batch)

    def enter_each(
        self,
        batch: Batch,
        sessions: Sequence[Session | ServingError | None],
        served: ServedModel | None,
    ) -> None:
        """Enter the sessions of a batch; those that are None enter later, by `step_alone`.

        Args:
            batch: all of them.
            sessions: for each the session, or why there is none.
            served: their model, if none is missing and all have the same.
        """
        if served is not None:
            here: list[Session] = sessions  # type: ignore[assignment]
            places = np.fromiter([session.place for session in here], np.int64)
            if served.room.is_idle.each[places].all():
                return self._enter_groups(batch, served, np.arange(len(here)), here, places)
        together = defaultdict[tuple[ServedModel, Call | Group | None], list[int]](list)
        for index, session in enumerate(sessions):
            if session is None:
                continue
            if isinstance(session, ServingError):
                batch.settle_error(index, session)
                continue
            last = session.waiting[-1] if session.waiting else session.first_call
            if isinstance(last, Call) or not session.is_ready or session.loss or session.is_leaving:
                self.step_alone(batch, index, session)
            else:
                together[session.model, last].append(index)
        for (served_here, _), indices in together.items():
            those: list[Session] = [sessions[index] for index in indices]  # type: ignore[misc]  # none is an error
            places = np.array([session.place for session in those])
            self._enter_groups(batch, served_here, np.array(indices), those, places)
        return None

    def _enter_groups(
        self, batch: Batch, served: ServedModel, indices: Rows, sessions: list[Session], places: Rows
    ) -> None:
        """Enter sessions of a model that stand at some indices of a batch, in groups of no more than fit into a run."""
        num_free = max(0, served.limits.max_pending_messages - served.num_pending)
        for index in indices[num_free:].tolist():
            batch.settle_error(index, queue_full(served))
        served.num_pending += min(num_free, len(indices))
        size = served.runner.max_batch_size
        for start in range(0, min(num_free, len(indices)), size):
            part = slice(start, min(start + size, num_free))
            its, ids, inputs, first_steps = indices[part], batch.session_ids, batch.inputs, batch.first_steps
            if len(its) < len(ids):
                ids, inputs = [ids[index] for index in its], inputs[its]
                first_steps = [first_steps[index] for index in its] if first_steps else ()
            group = Group(
                served=served,
                session_ids=ids,
                sessions=sessions[part],
                places=places[part],
                inputs=inputs,
                batch=batch,
                indices=its,
                first_steps=first_steps,
                begin=self._begin_group,
            )
            self._lines.enter_group(group)

    def look(self, call: Call, then: Callable[[dict[str, Array]], None]) -> None:
        """Read the state of the session whose call is being served: a message of no steps."""
        session = call.session

        def on_ended(message: Message) -> None:
            error = session.loss or message.errors.get(0)
            if error is not None:
                self._lines.fail(call, error)
            else:
                assert message.state is not None
                then({name: values[0] for name, values in message.state.items()})
            self._lines.serve(session)

        model = session.model.model
        call.message = Message(
            [session.session_id],
            [session.next_step],
            model.no_inputs[np.newaxis],
            model.no_outputs[np.newaxis],
            [session.slot],
            [INITIAL_SLOT],
            session.model.slots.shared(session.slot),
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
            histories = session.model.histories
            known = histories.outputs_of(session.place, inputs, first_step)
            new_inputs = inputs[len(known) :]
            if len(new_inputs):
                if first_step is not None:
                    _check_has_not_failed(session, new_inputs)
                return self._run(call, new_inputs, known, wants_state)
            end_step = (first_step or 0) + len(inputs)
            if not wants_state:
                return self._lines.end(call, StepResult(known, end_step, {}))
            if end_step != session.next_step or histories.was_reset_at(session.place, end_step):
                raise StateNotKeptError(end_step - 1, session.next_step)
            return self.look(call, lambda state: self._lines.end(call, StepResult(known, end_step, state)))

        return begin

    def _run(self, call: Call, inputs: Array, known_outputs: Array, wants_state: bool) -> None:
        """Run steps of the call, together with those of others whose turn comes in this turn of the event loop."""
        session, is_due = call.session, False
        if self._is_durable:
            num_steps_since = session.next_step + len(inputs) - session.about.snapshot_step
            is_due = num_steps_since >= self._snapshot_every_steps
        wants_state = wants_state or bool(self._watching.of and self._watching.want_state(session.session_id))
        if not self._begun:
            session.model.loop.call_soon(self._run_begun)
        self._begun.append(_Begun(call, inputs, known_outputs, wants_state, is_due))

    def _run_begun(self) -> None:
        """Send what has begun in the last turn of the event loop to the engine."""
        begun, self._begun = self._begun, []
        here = [one for one in begun if not one.call.future.cancelled()]
        if len(here) < len(begun):
            cancelled = [one for one in begun if one.call.future.cancelled()]
            self._fail_begun(cancelled, asyncio.CancelledError())
        messages = defaultdict[ServedModel, list[Message]](list)
        for part in _by_message(here):
            try:
                message = self._run_alone(*part) if len(part) == 1 else self._run_together(part)
                messages[part[0].call.session.model].append(message)
            except Exception as error:  # a bug must keep nobody waiting
                self._fail_begun(part, error)
        for served, its_own in messages.items():
            served.submit_now(its_own)

    def _fail_begun(self, begun: Sequence[_Begun], error: BaseException) -> None:
        for one in begun:
            self._lines.fail(one.call, error)
            self._lines.serve(one.call.session)

    def _run_together(self, begun: Sequence[_Begun]) -> Message:
        """A message for calls whose steps run together; their answers are the outputs known and the new ones."""
        served, wants_state = begun[0].call.session.model, begun[0].wants_state
        calls, inputs, known_outputs, _, _ = zip(*begun, strict=True)
        sessions = [call.session for call in calls]
        company = CallsTogether(
            served=served,
            session_ids=[session.session_id for session in sessions],
            sessions=sessions,
            places=np.fromiter([session.place for session in sessions], np.int64),
            inputs=np.array(inputs),
            calls=[*calls],
        )
        known = {call: outputs for call, outputs in zip(calls, known_outputs, strict=True) if len(outputs)}

        def answer(outputs: Array, errors: Mapping[int, ServingError], state: Mapping[str, Array]) -> None:
            next_steps = served.histories.next_step.each[company.places].tolist()
            results: list[StepResult | ServingError] = []
            for row, call in enumerate(company.calls):
                if row in errors:
                    results.append(errors[row])
                    continue
                # Copies: whoever is slow to read its answer is not to keep everybody's.
                its_own = (
                    np.concatenate([known[call], outputs[row]]) if call in known else outputs[row].copy()
                )
                its_state = {name: values[row].copy() for name, values in state.items()}
                results.append(StepResult(its_own, next_steps[row], its_state))
            self._lines.end_calls(company, results)

        message = self._run_company(company, wants_state, answer)
        for call in calls:
            call.message, call.company = message, company
        return message

    def _run_alone(self, begun: _Begun) -> Message:
        """As `_run_together`, for one, which takes less: where one number is asked for, numpy is slow."""
        call, inputs, known_outputs, wants_state, is_due = begun
        session, served = call.session, call.session.model
        no_outputs = served.model.no_outputs
        outputs = np.empty((len(inputs), *no_outputs.shape[1:]), no_outputs.dtype)
        first_step, slot_before, slot = session.next_step, session.slot, served.slots.take()

        def on_ended(message: Message) -> None:
            error = session.loss or message.errors.get(0)
            state = {name: values[0] for name, values in (message.state or {}).items()}
            if error is not None:
                served.slots.release(slot)
                self._settle_failure(session, inputs, error, lambda: self._lines.fail(call, error))
            elif self._is_durable:
                change = self._stepped(session, slot, inputs, outputs, state if is_due else None)
                self._lines.commit([change], partial(committed, state))
            else:
                _take_on(session, slot, inputs, outputs)
                return committed(state, [None])
            return self._lines.serve(session)

        def committed(state: dict[str, Array], errors: list[ServingError | None]) -> None:
            if errors[0] is not None:
                self._lines.fail(call, errors[0])
            else:
                joined = np.concatenate([known_outputs, outputs]) if len(known_outputs) else outputs
                next_step = first_step + len(inputs)
                if self._watching.of:
                    frame = Frame(first_step, inputs, outputs, next_step, state if wants_state else {})
                    self._watching.offer(session.session_id, frame)
                self._lines.end(call, StepResult(joined, next_step, state if wants_state else {}))
            self._lines.serve(session)

        call.message = Message(
            [session.session_id],
            [first_step],
            inputs[np.newaxis],
            outputs[np.newaxis],
            [slot_before],
            [slot],
            served.slots.shared(slot_before),
            wants_state=wants_state or is_due,
            on_ended=on_ended,
        )
        return call.message

    def _stepped(
        self, session: Session, slot: int, inputs: Array, outputs: Array, state: dict[str, Array] | None
    ) -> Change:
        """Steps that ended well, their end state in a slot; with the state, if that is to be a snapshot."""
        about, first_step, last_use_s = session.about, session.next_step, self._journal.service_time_s
        next_step = first_step + len(inputs)
        where = session.model.fingerprint
        record = encode_record(session.session_id, first_step, inputs, outputs, where.digest)
        snapshot, forget_before = None, None
        if state is not None:
            snapshot = encode_snapshot(session.model.model, next_step, state)
            forget_before = max(0, next_step - session.model.limits.retry_window_steps)
            resets = session.model.histories.reset_steps(session.place)
            about = about.with_snapshot(snapshot, next_step, resets, where)
        if about.fingerprint != where.text:
            about = replace(about, fingerprint=where.text)
        entry = None if about is session.about else session.entry(about, next_step, last_use_s)
        write = Write(
            session.session_id, session.fence, next_step, last_use_s, record, entry, snapshot, forget_before
        )

        def apply() -> None:
            session.about = about
            _take_on(session, slot, inputs, outputs)

        return Change(session, write, apply, partial(session.model.slots.release, slot))

    def _settle_failure(
        self, session: Session, inputs: Array, error: ServingError, then: Callable[[], None]
    ) -> None:
        """Note that a message has failed by its inputs, so that a repeat gets the same answer; then go on."""
        if session.loss or type(error) not in (StepFailedError, OutputNotFiniteError):
            return then()
        step = error.step if isinstance(error, OutputNotFiniteError) else -1
        kind = "OUTPUT_NOT_FINITE" if isinstance(error, OutputNotFiniteError) else "STEP_FAILED"
        failure = Failure(session.next_step, digest_of(inputs), kind, step)  # type: ignore[arg-type]
        change = self._lines.change(session, replace(session.about, failure=failure))

        def committed(_errors: list[ServingError | None]) -> None:
            then()
            self._lines.serve(session)

        return self._lines.commit([change], committed)

    # Messages of many sessions.

    def step_alone(self, batch: Batch, index: int, session: Session) -> None:
        """Enter a call for one session of a batch, behind other calls."""
        first_step = batch.first_steps[index] if batch.first_steps else None
        try:
            self.step(session, batch.inputs[index], first_step, batch=(batch, index))
        except ServingError as error:
            batch.settle_error(index, error)

    def _begin_group(self, group: Group) -> None:
        """Send a group's message; a session that is not where the steps begin is served by itself."""
        served, first_steps = group.served, group.first_steps
        others: list[Session] = []
        if first_steps:
            next_steps = served.histories.next_step.each[group.places].tolist()
            if next_steps != first_steps or served.room.num_failed:
                elsewhere = [
                    row
                    for row, session in enumerate(group.sessions)
                    if first_steps[row] != next_steps[row] or session.has_just_failed
                ]
                if elsewhere:
                    others = self._split_off(group, elsewhere)
        if group.sessions:
            self._run_group(group)
        else:
            group.batch.calls.remove(group)
        for session in others:
            self._lines.serve(session)

    def _split_off(self, group: Group, rows: list[int]) -> list[Session]:
        """Put calls of their own in the place of the group for some of its sessions; returns these."""
        apart = set(rows)
        for row in rows:
            session, begin = group.sessions[row], self._stepping(group.inputs[row], group.first_steps[row])
            session.put_first(group.batch.call(session, begin, int(group.indices[row])))
        others = [group.sessions[row] for row in rows]
        group.keep([row for row in range(len(group.sessions)) if row not in apart])
        return others

    def _run_group(self, group: Group) -> None:
        def answer(outputs: Array, errors: Mapping[int, ServingError], _state: Mapping[str, Array]) -> None:
            self._answer_group(group, outputs, errors)

        watching = self._watching
        wants_state = bool(watching.of) and any(map(watching.want_state, group.session_ids))
        group.served.submit(self._run_company(group, wants_state, answer))

    def _run_company(self, company: Company, wants_state: bool, answer: _Answer) -> Message:
        """A message for sessions whose steps run together; `answer` is called when what ended well is theirs."""
        served, places, inputs = company.served, company.places, company.inputs
        room, no_outputs = served.room, served.model.no_outputs
        next_steps = served.histories.next_step.each[places]
        present = room.slot.each[places]
        due = set[Session]()
        if self._is_durable:
            num_steps_since = next_steps + inputs.shape[1] - room.snapshot_step.each[places]
            are_due = num_steps_since >= self._snapshot_every_steps
            due.update(company.sessions[row] for row in np.flatnonzero(are_due).tolist())

        def end(outputs: Array, errors: Mapping[int, ServingError], state: Mapping[str, Array]) -> None:
            if self._watching.of:
                self._offer_each(company, outputs, errors, state)
            answer(outputs, errors, state)

        def on_ended(message: Message) -> None:
            sessions, inputs, outputs = company.sessions, company.inputs, message.outputs
            slots, state = np.asarray(message.write_slots), message.state or {}
            errors = dict(message.errors)
            if room.num_lost:
                errors |= {row: session.loss for row, session in enumerate(sessions) if session.loss}
            if not errors and not self._is_durable:
                _take_on_each(served, company.places, np.asarray(message.slots), slots, inputs, outputs)
                return end(outputs, errors, state if wants_state else {})
            served.slots.release_many(slots[[*errors]])
            rows = [row for row in range(len(sessions)) if row not in errors]
            num_left = len(errors) + 1

            def change(row: int) -> Change:
                is_due = sessions[row] in due and state
                snapshot = {name: values[row] for name, values in state.items()} if is_due else None
                return self._stepped(sessions[row], int(slots[row]), inputs[row], outputs[row], snapshot)

            def settle() -> None:
                nonlocal num_left
                num_left -= 1
                if not num_left:
                    end(outputs, errors, state if wants_state else {})

            def committed(outcomes: list[ServingError | None]) -> None:
                errors.update(
                    {row: error for row, error in zip(rows, outcomes, strict=True) if error is not None}
                )
                settle()

            # What failed is noted in the same commit.
            for row, error in errors.items():
                self._settle_failure(sessions[row], inputs[row], error, settle)
            if self._is_durable:
                return self._lines.commit([change(row) for row in rows], committed)
            for row in rows:
                _take_on(sessions[row], int(slots[row]), inputs[row], outputs[row])
            return settle()

        company.message = Message(
            company.session_ids,
            next_steps,
            inputs,
            np.empty((*inputs.shape[:2], *no_outputs.shape[1:]), no_outputs.dtype),
            present,
            served.slots.take_many(len(places)),
            served.slots.shared_many(present),
            wants_state=wants_state or bool(due),
            on_ended=on_ended,
        )
        return company.message

    def _offer_each(
        self,
        company: Company,
        outputs: Array,
        errors: Mapping[int, ServingError],
        state: Mapping[str, Array],
    ) -> None:
        """Tell the watchers of sessions whose steps ran together; what they are told is theirs."""
        next_steps = company.served.histories.next_step.each[company.places].tolist()
        for row, session_id in enumerate(company.session_ids):
            if session_id in self._watching.of and row not in errors:
                inputs, next_step = company.inputs[row], next_steps[row]
                its_state = {name: values[row].copy() for name, values in state.items()}
                frame = Frame(
                    next_step - len(inputs), inputs.copy(), outputs[row].copy(), next_step, its_state
                )
                self._watching.offer(session_id, frame)

    def _answer_group(self, group: Group, outputs: Array, errors: Mapping[int, ServingError]) -> None:
        if not self._journal.holds_lease:
            errors = dict.fromkeys(range(len(group.sessions)), LeaseLapsedError())
        group.batch.settle_group(group, outputs, errors)
        # Only now, since whose turn it is next sees what has become of the session.
        self._lines.end_group(group)


def _by_message(begun: Sequence[_Begun]) -> list[Sequence[_Begun]]:
    """Calls of each message: alike ones together, as many as may be and no fewer than pays, the rest each alone."""
    if len(begun) < _FEWEST_CALLS:
        return [[one] for one in begun]
    alike = defaultdict[_Kind, list[_Begun]](list)
    for one in begun:
        alike[one.kind].append(one)
    parts: list[Sequence[_Begun]] = []
    for (served, *_), its_own in alike.items():
        size = min(_MOST_CALLS, served.runner.max_batch_size)
        for start in range(0, len(its_own), size):
            part = its_own[start : start + size]
            parts += [part] if len(part) >= _FEWEST_CALLS else [[one] for one in part]
    return parts


def _take_on(session: Session, slot: int, inputs: Array, outputs: Array) -> None:
    """Make steps that ended well, [T, ...] each, part of a session: state, counter and record."""
    session.model.histories.add(session.place, inputs, outputs)
    move(session, slot)


def _take_on_each(
    served: ServedModel,
    places: Rows,
    slots_before: Rows,
    slots: Rows,
    inputs: Array,
    outputs: Array,
) -> None:
    """As `_take_on`, for sessions of a model in some places: inputs and outputs [S, T, ...]."""
    served.histories.add_each(places, inputs, outputs)
    served.room.slot.each[places] = slots
    served.slots.release_many(slots_before)


def _check_has_not_failed(session: Session, inputs: Array) -> None:
    """That a numbered message is not one that has failed already."""
    failure = session.about.failure
    if failure is not None and session.has_just_failed and failure.inputs_digest == digest_of(inputs):
        label = session.model.model.label
        if failure.kind == "STEP_FAILED":
            raise StepFailedError(label)
        raise OutputNotFiniteError(label, failure.step)
