"""Steps: messages of inputs, for one session or for many, from their line through the engine into the store.

The engine works in a slot of the message's own. Only what ended well there, and was committed to the store, becomes the
session's state and history, and is answered. A message that repeats one is answered from the session's history.

`lines.py` says whose turn it is; `engine.py` runs the messages.

Shapes: S sessions of a batch, T steps of a message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ntm.tensor import Array
from server.engine import Message
from server.errors import (
    LeaseLapsedError,
    OutputNotFiniteError,
    ServingError,
    StateNotKeptError,
    StepFailedError,
)
from server.journal import Journal
from server.lines import Change, Lines, queue_full
from server.model_runner import INITIAL_SLOT
from server.records import Failure, digest_of, encode_record, encode_snapshot
from server.served_model import ServedModel
from server.session import Batch, Call, Group, Session, StepResult
from server.store import Write


class Steps:
    """Runs messages."""

    def __init__(self, lines: Lines, journal: Journal, snapshot_every_steps: int) -> None:
        """Commit to a journal, with a snapshot whenever a session has run so many steps since the last."""
        self._lines = lines
        self._journal = journal
        self._snapshot_every_steps = snapshot_every_steps
        self._is_durable = journal.store.keeps_steps

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

    def step_each(
        self, sessions: Sequence[Session | ServingError | None], inputs: Array, first_steps: Sequence[int]
    ) -> Batch:
        """As `SessionManager.step_each`; those that are None enter later, by `step_alone`."""
        batch = Batch(len(sessions), inputs.shape[1])
        together = defaultdict[tuple[ServedModel, Group | None], list[int]](list)
        for index, session in enumerate(sessions):
            if session is None:
                continue
            if isinstance(session, ServingError):
                batch.settle(index, session)
                continue
            last = session.calls[-1] if session.calls else None
            if isinstance(last, Call) or not session.is_ready or session.loss or session.is_leaving:
                self.step_alone(batch, index, session, inputs, first_steps)
            else:
                together[session.model, last].append(index)
        for (served, _), indices in together.items():
            num_free = max(0, served.limits.max_pending_messages - served.num_pending)
            for index in indices[num_free:]:
                batch.settle(index, queue_full(served))
            del indices[num_free:]
            served.num_pending += len(indices)
            size = served.runner.max_batch_size
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                group = Group(
                    batch,
                    served,
                    part,
                    [sessions[index] for index in part],  # type: ignore[misc]  # none is an error
                    inputs if len(part) == len(sessions) else inputs[part],
                    [first_steps[index] for index in part] if first_steps else (),
                    self._begin_group,
                )
                self._lines.enter_group(group)
        return batch

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
                if first_step is not None:
                    _check_has_not_failed(session, new_inputs)
                return self._run(call, new_inputs, known, wants_state)
            end_step = (first_step or 0) + len(inputs)
            if not wants_state:
                return self._lines.end(call, StepResult(known, end_step, {}))
            if end_step != session.next_step or session.history.was_reset_at(end_step):
                raise StateNotKeptError(end_step - 1, session.next_step)
            return self.look(call, lambda state: self._lines.end(call, StepResult(known, end_step, state)))

        return begin

    def _run(self, call: Call, inputs: Array, known_outputs: Array, wants_state: bool) -> None:
        """Send a message for the call; its answer is the outputs known and the new ones."""
        session, served = call.session, call.session.model
        no_outputs = served.model.no_outputs
        outputs = np.empty((len(inputs), *no_outputs.shape[1:]), no_outputs.dtype)
        slot = served.slots.take()
        is_due = self._is_durable and self._is_snapshot_due(session, len(inputs))

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
                _take_on(served, [session], [slot], [inputs], [outputs])
                return committed(state, [None])
            return self._lines.serve(session)

        def committed(state: dict[str, Array], errors: list[ServingError | None]) -> None:
            if errors[0] is not None:
                self._lines.fail(call, errors[0])
            else:
                joined = np.concatenate([known_outputs, outputs]) if len(known_outputs) else outputs
                self._lines.end(call, StepResult(joined, session.next_step, state if wants_state else {}))
            self._lines.serve(session)

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
        return session.next_step + num_steps - session.about.snapshot_step >= self._snapshot_every_steps

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
            about = about.with_snapshot(snapshot, next_step, session.history.reset_steps, where)
        if about.fingerprint != where.text:
            about = replace(about, fingerprint=where.text)
        entry = None if about is session.about else session.entry(about, next_step, last_use_s)
        write = Write(
            session.session_id, session.fence, next_step, last_use_s, record, entry, snapshot, forget_before
        )

        def apply() -> None:
            session.about = about
            _take_on(session.model, [session], [slot], [inputs], [outputs])

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

    def _begin_group(self, group: Group) -> None:
        """Send a group's message; a session that is not where the steps begin is served by itself."""
        elsewhere = [
            row
            for row, (session, first_step) in enumerate(zip(group.sessions, group.first_steps, strict=False))
            if first_step != session.history.next_step or session.has_just_failed
        ]
        others = self._split_off(group, elsewhere) if elsewhere else []
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
            first_step = group.first_steps[row] if group.first_steps else None
            session, begin = group.sessions[row], self._stepping(group.inputs[row], first_step)
            session.calls[0] = group.batch.call(session, begin, group.indices[row])
        others = [group.sessions[row] for row in rows]
        group.keep([row for row in range(len(group.sessions)) if row not in apart])
        return others

    def _run_group(self, group: Group) -> None:
        served, sessions, inputs = group.served, group.sessions, group.inputs
        no_outputs = served.model.no_outputs
        outputs = np.empty((*inputs.shape[:2], *no_outputs.shape[1:]), no_outputs.dtype)
        slots = [served.slots.take() for _ in sessions]
        num_steps = inputs.shape[1]
        are_due = [self._is_durable and self._is_snapshot_due(session, num_steps) for session in sessions]

        def on_ended(message: Message) -> None:
            errors = dict(message.errors)
            errors |= {row: session.loss for row, session in enumerate(sessions) if session.loss}
            served.slots.release_many([slots[row] for row in errors])
            rows = [row for row in range(len(sessions)) if row not in errors]
            failing = [
                partial(self._settle_failure, sessions[row], inputs[row], error)
                for row, error in errors.items()
            ]
            if self._is_durable:
                changes = []
                for row in rows:
                    state = None
                    if are_due[row] and message.state is not None:
                        state = {name: values[row] for name, values in message.state.items()}
                    changes.append(self._stepped(sessions[row], slots[row], inputs[row], outputs[row], state))
                self._lines.commit(changes, partial(committed, rows, errors, failing))
            else:
                if errors:
                    those, their_slots = [sessions[row] for row in rows], [slots[row] for row in rows]
                    _take_on(served, those, their_slots, inputs[rows], outputs[rows])
                else:
                    _take_on(served, sessions, slots, inputs, outputs)
                committed(rows, errors, failing, [None] * len(rows))

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
            [session.history.next_step for session in sessions],
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
        self._lines.end_group(group)


def _take_on(
    served: ServedModel,
    sessions: Sequence[Session],
    slots: Sequence[int],
    inputs: Iterable[Array],
    outputs: Iterable[Array],
) -> None:
    """Make steps that ended well part of sessions of a model: state, counter and record."""
    slots_before = [session.slot for session in sessions]
    for session, slot, its_inputs, its_outputs in zip(sessions, slots, inputs, outputs, strict=True):
        session.history.add(its_inputs, its_outputs)
        session.slot = slot
    served.slots.release_many(slots_before)


def _check_has_not_failed(session: Session, inputs: Array) -> None:
    """That a numbered message is not one that has failed already."""
    failure = session.about.failure
    if failure is not None and session.has_just_failed and failure.inputs_digest == digest_of(inputs):
        label = session.model.model.label
        if failure.kind == "STEP_FAILED":
            raise StepFailedError(label)
        raise OutputNotFiniteError(label, failure.step)
