"""Executor: the life of a step request, between `rpc/` and the engine.

    admit      order, retry window, limits; what is the first in its queue goes to the scheduler
    (engine)   next_batch, run
    commit     retry window, slots, store: once for all that a batch ended
    reply      what stands behind goes to the scheduler, then the callers are answered

The engine works in a slot of the request's own. Only what ended well there, and was committed to the store, becomes the
session's state and retry window, and is answered. A request that repeats one is answered from the retry window.

Shapes: S sessions of a request, T steps.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from time import perf_counter

import numpy as np
import structlog

from ntm.tensor import Array
from server.engine.request import NO_SLOTS
from server.errors import (
    EngineFailedError,
    LeaseLapsedError,
    OutputNotFiniteError,
    ServingError,
    SessionMovedError,
    StateNotKeptError,
    StepFailedError,
)
from server.model.layout import Steps
from server.runtime.runner import INITIAL_SLOT
from server.sessions.changes import loss_by
from server.sessions.queues import SessionQueues
from server.sessions.request import NOBODY, EngineCall, StepRequest
from server.sessions.served_model import ServedModel
from server.sessions.session import Session
from server.sessions.watching import Frame
from server.storage.async_store import AsyncStore
from server.storage.codec import Failure, SessionMetadata, digest_of, encode_record, encode_snapshot
from server.storage.commit_writer import Outcome
from server.storage.interface import Write

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Change:
    """What is to become of one session of a request once the store has it."""

    request: StepRequest
    row: int
    write: Write
    metadata: SessionMetadata


class StepExecutor:
    """Runs step requests. Everything here runs in the event loop's thread."""

    def __init__(self, store: AsyncStore, snapshot_every_steps: int) -> None:
        """Commit to a store, with a snapshot whenever a session has run so many steps since the last."""
        self.queues = SessionQueues(store, self._begin)
        self._store = store
        self._is_durable = store.backend.keeps_steps
        self._snapshot_every_steps = snapshot_every_steps
        self._loop = asyncio.get_running_loop()
        self._to_dispatch: list[StepRequest] = []
        self._watching = self.queues.watching

    # Admit.

    def admit(self, requests: Iterable[StepRequest]) -> None:
        """Take requests in; each is answered by its `reply_to`, if need be with what was wrong with it."""
        for request in requests:
            try:
                self.queues.enqueue(request)
            except ServingError as error:
                request.errors = dict.fromkeys(range(len(request.sessions)), error)
                request.has_failed = request.is_over = True
                request.reply_to.reply(request)

    def cancel(self, request: StepRequest) -> None:
        """The caller has left: what has not had a turn leaves no trace, and the rest runs to its end."""
        if request.is_over:
            return
        request.reply_to = NOBODY
        if not request.is_begun:
            request.has_failed = request.is_over = True
            self.queues.withdraw(request)
        elif request in self._to_dispatch:
            self._to_dispatch.remove(request)
            self._take_out(request)
        elif request.model.engine.cancel(request):
            self._take_out(request)

    def _take_out(self, request: StepRequest) -> None:
        """A request that was begun, and has not had a turn, is over."""
        request.has_failed = request.is_over = True
        _release(request.model, request, range(len(request.sessions)))
        self.queues.leave(request.model, [request])

    def _begin(self, request: StepRequest) -> None:
        """A request's turn has come in all its queues: answer it from the retry window, or have it run."""
        request.is_begun = True
        try:
            is_to_run = (
                self._prepare_one(request) if len(request.sessions) == 1 else self._prepare_many(request)
            )
        except Exception as error:  # a bug in one request must not keep what stands behind it waiting
            if not isinstance(error, ServingError):
                log.error("a request could not be begun", model=request.model.model.label, exc_info=error)
            request.errors = dict.fromkeys(range(len(request.sessions)), error)  # type: ignore[arg-type]
            is_to_run = False
        if is_to_run:
            if self._watching.of and any(map(self._watching.want_state, request.session_ids)):
                request.reads_state = True
            if not self._to_dispatch:
                self._loop.call_soon(self._dispatch)
            self._to_dispatch.append(request)
            return
        self._end(request)
        for session in request.sessions:
            self.queues.leave_one(request, session)
        self._answer(request)

    def _prepare_one(self, request: StepRequest) -> bool:
        """Say what of a request of one session is to run; False if its answer is known.

        In scalars: for S = 1 that takes 0.4 µs, and by arrays 4.0.
        """
        (session,), model = request.sessions, request.model
        table, index, inputs = session.table, session.index, request.caller_inputs
        next_step = table.next_step.one[index]
        if request.caller_steps is not None:
            first_step = request.caller_steps[0]
            if first_step != next_step:
                known = table.retry_windows.outputs_of(index, inputs[0], first_step)
                if request.trace_names and len(known):
                    raise StateNotKeptError(first_step, next_step)
                request.known_outputs = known
                inputs = inputs[:, len(known) :]
            if inputs.shape[1] and table.num_failed:
                _check_has_not_failed(session, inputs[0])
        num_steps = inputs.shape[1]
        slot = table.slot.one[index]
        if num_steps:
            request.end_steps = (next_step + num_steps,)
            num_steps_since = next_step + num_steps - table.snapshot_step.one[index]
            if self._is_durable and num_steps_since >= self._snapshot_every_steps:
                request.due_rows = frozenset((0,))
            write_slot = model.slots.take()
        else:
            assert request.caller_steps is not None
            end_step = request.caller_steps[0] + request.caller_inputs.shape[1]
            request.end_steps = (end_step,)
            if not request.wants_state:
                return False
            if end_step != next_step or table.retry_windows.was_reset_at(index, end_step):
                raise StateNotKeptError(end_step - 1, next_step)
            write_slot = slot
        request.prepare(inputs, (next_step,), (slot,), (write_slot,), model.slots.shared(slot))
        initial_slot = table.initial_slot.one[index]
        if initial_slot != INITIAL_SLOT:
            request.initial_slots = (initial_slot,)
        return True

    def _prepare_many(self, request: StepRequest) -> bool:
        """As `_prepare_one`, for several sessions; one that is not where its steps begin goes on by itself."""
        model, others = request.model, list[Session]()
        table, next_steps = model.table, model.table.next_step.each[request.indices]
        if request.caller_steps is not None and (
            next_steps.tolist() != [*request.caller_steps] or table.num_failed
        ):
            others = self._split_off(request, next_steps.tolist())
            next_steps = table.next_step.each[request.indices]
        num_sessions, num_steps = len(request.sessions), request.caller_inputs.shape[1]
        if num_sessions:
            slots = table.slot.each[request.indices]
            end_steps = next_steps + num_steps
            request.end_steps = end_steps.tolist()
            if self._is_durable:
                num_steps_since = end_steps - table.snapshot_step.each[request.indices]
                are_due = num_steps_since >= self._snapshot_every_steps
                request.due_rows = frozenset(np.flatnonzero(are_due).tolist())
            request.prepare(
                request.caller_inputs,
                next_steps,
                slots,
                model.slots.take_many(num_sessions),
                model.slots.shared_many(slots),
            )
            initial_slots = table.initial_slot.each[request.indices]
            if np.count_nonzero(initial_slots != INITIAL_SLOT):
                request.initial_slots = initial_slots
        for session in others:
            self.queues.advance(session)
        return num_sessions > 0

    def _split_off(self, request: StepRequest, next_steps: list[int]) -> list[Session]:
        """Give the sessions of a request that are elsewhere one of their own each, in its place; returns these."""
        assert request.caller_steps is not None
        apart = [
            row
            for row, session in enumerate(request.sessions)
            if request.caller_steps[row] != next_steps[row] or session.has_just_failed
        ]
        for row in apart:
            alone = StepRequest(
                [request.sessions[row]],
                request.caller_inputs[row : row + 1],
                [request.caller_steps[row]],
                request.reply_to,
                positions=[request.positions[row]],
            )
            request.reply_to.add(alone)
            request.sessions[row].replace_head(alone)
        others = [request.sessions[row] for row in apart]
        request.keep([row for row in range(len(request.sessions)) if row not in set(apart)])
        return others

    def _dispatch(self) -> None:
        """Hand what is to run to the engines, all of one turn of the event loop at once, so that it runs together."""
        requests, self._to_dispatch = self._to_dispatch, []
        while requests:
            model = requests[0].model
            together = [request for request in requests if request.model is model]
            if len(together) < len(requests):
                requests = [request for request in requests if request.model is not model]
            else:
                requests = []
            try:
                model.submit(together)
            except Exception as error:  # a bug must keep nobody waiting
                log.error("requests could not be run", model=model.model.label, exc_info=error)
                for request in together:
                    _release(model, request, range(len(request.sessions)))
                    request.errors = dict.fromkeys(range(len(request.sessions)), error)  # type: ignore[arg-type]
                self._reply(model, together)

    # Commit.

    def commit(self, model: ServedModel, ended: list[StepRequest]) -> None:
        """Make what a batch ended part of its sessions, and answer it."""
        if self._is_durable or model.table.num_lost or any(request.errors for request in ended):
            self.queues.spawn(self._commit_to_store(model, ended))
        else:
            try:
                _take_over(model, ended)
            except Exception as error:  # a bug must not keep anybody waiting
                self._give_up(model, ended, error)
            self._reply(model, ended)

    async def _commit_to_store(self, model: ServedModel, ended: list[StepRequest]) -> None:
        """Commit, and then apply, what became of each session: steps that ended well, and failures to be repeated."""
        try:
            changes = [change for request in ended for change in self._changes(request)]
            start_s = perf_counter()
            outcomes = await self._store.commit([change.write for change in changes]) if changes else []
            if changes and self._is_durable:
                times_s = start_s, perf_counter()
                for request in ended:
                    request.commit_times_s = times_s
            for change, outcome in zip(changes, outcomes, strict=True):
                self._apply(model, change, outcome)
        except Exception as error:
            self._give_up(model, ended, error)
        self._reply(model, ended)

    def _changes(self, request: StepRequest) -> Iterable[_Change]:
        for row, session in enumerate(request.sessions):
            if session.loss is not None:
                request.errors[row] = session.loss
            error = request.errors.get(row)
            if error is not None:
                _release(request.model, request, [row])
                if session.loss is None and type(error) in (StepFailedError, OutputNotFiniteError):
                    yield self._failure(request, row, error)
            elif request.inputs.shape[1]:
                yield self._success(request, row)

    def _success(self, request: StepRequest, row: int) -> _Change:
        """Steps that ended well; with the state after them, if that is to be a snapshot."""
        session, model = request.sessions[row], request.model
        assert request.outputs is not None
        inputs, outputs = request.inputs[row], request.outputs[row]
        first_step, last_use_s = session.next_step, self._store.service_time_s
        next_step = first_step + len(inputs)
        metadata, where = session.metadata, model.fingerprint
        snapshot, forget_before = None, None
        if row in request.due_rows and request.state is not None:
            state = {name: values[row] for name, values in request.state.items()}
            snapshot = encode_snapshot(model.model, next_step, state)
            forget_before = max(0, next_step - model.limits.retry_window_steps)
            resets = session.table.retry_windows.reset_steps(session.index)
            metadata = metadata.with_snapshot(snapshot, next_step, resets, where)
        if self._is_durable and metadata.fingerprint != where.text:
            metadata = replace(metadata, fingerprint=where.text)
        write = Write(
            session.session_id,
            session.fence,
            next_step,
            last_use_s,
            encode_record(session.session_id, first_step, inputs, outputs, where.digest),
            None if metadata is session.metadata else session.entry(metadata, next_step, last_use_s),
            snapshot,
            forget_before,
        )
        return _Change(request, row, write, metadata)

    def _failure(self, request: StepRequest, row: int, error: ServingError) -> _Change:
        """A request that failed by its inputs, so that a repeat gets the same answer."""
        session = request.sessions[row]
        is_not_finite = isinstance(error, OutputNotFiniteError)
        failure = Failure(
            session.next_step,
            digest_of(request.inputs[row]),
            "OUTPUT_NOT_FINITE" if is_not_finite else "STEP_FAILED",
            error.step if isinstance(error, OutputNotFiniteError) else -1,
        )
        metadata = replace(session.metadata, failure=failure)
        last_use_s = self._store.service_time_s
        entry = session.entry(metadata, session.next_step, last_use_s)
        write = Write(session.session_id, session.fence, session.next_step, last_use_s, entry=entry)
        return _Change(request, row, write, metadata)

    def _apply(self, model: ServedModel, change: _Change, outcome: Outcome) -> None:
        """Make a change part of its session; one whose change was not committed is lost."""
        request, row, session = change.request, change.row, change.request.sessions[change.row]
        has_failed = row in request.errors
        if outcome is not None:
            self.queues.lose(session, loss_by(outcome, session.session_id))
        if session.loss is not None:
            if not has_failed:
                request.errors[row] = session.loss
                _release(model, request, [row])
            return
        session.metadata = change.metadata
        if not has_failed:
            assert request.outputs is not None
            session.table.retry_windows.add(session.index, request.inputs[row], request.outputs[row])
            session.move_to(int(request.write_slots[row]))

    def _give_up(self, model: ServedModel, ended: Sequence[StepRequest], error: Exception) -> None:
        """Nobody knows what became of requests: their sessions leave memory, and are found as the store has them."""
        log.error("what a batch gave was lost", model=model.model.label, exc_info=error)
        for request in ended:
            for row, session in enumerate(request.sessions):
                request.errors.setdefault(row, EngineFailedError(model.model.label))
                if session.loss is None:
                    self.queues.lose(session, SessionMovedError(session.session_id))

    # Reply.

    def _reply(self, model: ServedModel, ended: list[StepRequest]) -> None:
        """Answer requests; what stands behind them begins first, so that it runs while they are answered."""
        for request in ended:
            self._end(request)
        # Only now, since whose turn it is next sees what has become of those before.
        self.queues.leave(model, ended)
        self._dispatch()
        for request in ended:
            self._answer(request)
            if self._watching.of:
                self._offer(request)

    def _end(self, request: StepRequest) -> None:
        """What became of a request is known; it is no answer if what this replica knows may be out of date."""
        if not self._store.holds_lease:
            for row in range(len(request.sessions)):
                request.errors.setdefault(row, LeaseLapsedError())
        request.is_over = True
        request.has_failed = bool(request.errors)

    def _answer(self, request: StepRequest) -> None:
        # Neither is to keep the other, or those before it, alive.
        reply_to, request.reply_to, request.follows = request.reply_to, NOBODY, None
        try:
            reply_to.reply(request)
        except Exception as error:  # one that cannot be answered must not keep others waiting
            log.error("a request could not be answered", exc_info=error)

    def _offer(self, request: StepRequest) -> None:
        """Tell the watchers of a request's sessions of its steps; what they are told is theirs."""
        for row, session_id in enumerate(request.session_ids):
            if session_id in self._watching.of and row not in request.errors and request.outputs is not None:
                inputs, end_step = request.inputs[row].copy(), request.end_steps[row]
                state = {name: values[row].copy() for name, values in (request.state or {}).items()}
                frame = Frame(end_step - len(inputs), inputs, request.outputs[row].copy(), end_step, state)
                self._watching.offer(session_id, frame)

    # State, for whoever has a session's turn.

    async def read_state(self, session: Session) -> dict[str, Array]:
        """The state of a session whose turn one has, by name, in the graph's axes.

        Raises:
            EngineFailedError; what became of the session meanwhile.
        """
        slot, model = session.slot, session.model
        call = EngineCall(
            [session.session_id],
            (session.next_step,),
            model.model.inputs.none(1, 0),
            (slot,),
            (slot,),
            model.slots.shared(slot) or NO_SLOTS,
            reads_state=True,
        )
        await model.run(call)
        if session.loss is not None:
            raise session.loss
        if call.errors:
            raise call.errors[0]
        assert call.state is not None
        return {name: values[0] for name, values in call.state.items()}


def _release(model: ServedModel, request: StepRequest, rows: Iterable[int]) -> None:
    """Give back the slots that were taken for steps that will not be their sessions'."""
    if request.inputs.shape[1]:
        model.slots.release_many(np.asarray(request.write_slots)[[*rows]])


def _take_over(model: ServedModel, ended: Sequence[StepRequest]) -> None:
    """Make steps that ended well part of their sessions: state, counter and retry window."""
    if len(ended) == 1 and len(ended[0].sessions) == 1:
        (request,), (session,) = ended, ended[0].sessions
        if request.inputs.shape[1]:
            assert request.outputs is not None
            session.table.retry_windows.add(session.index, request.inputs[0], request.outputs[0])
            session.move_to(request.write_slots[0])
        return
    by_steps = defaultdict[int, list[StepRequest]](list)
    for request in ended:
        by_steps[request.inputs.shape[1]].append(request)
    by_steps.pop(0, None)
    for requests in by_steps.values():
        indices = np.fromiter(
            chain.from_iterable(
                [r.indices.tolist() if len(r.sessions) > 1 else (r.index,) for r in requests]
            ),
            np.int64,
        )
        model.table.retry_windows.add_each(indices, _joined(requests, "inputs"), _joined(requests, "outputs"))
        slots = np.fromiter(chain.from_iterable([r.write_slots for r in requests]), np.int64)
        before = model.table.slot.each[indices]
        model.table.slot.each[indices] = slots
        model.slots.release_many(before)


def _joined(requests: Sequence[StepRequest], name: str) -> Steps:
    parts: list[Steps] = [getattr(request, name) for request in requests]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _check_has_not_failed(session: Session, inputs: Steps) -> None:
    """That a numbered request is not one that has failed already."""
    failure = session.metadata.failure
    if failure is not None and session.has_just_failed and failure.inputs_digest == digest_of(inputs):
        label = session.model.model.label
        if failure.kind == "STEP_FAILED":
            raise StepFailedError(label)
        raise OutputNotFiniteError(label, failure.step)
