"""Sessions: who has which state, and whose turn it is.

This is the server without gRPC: it makes a call on a session happen exactly once. Calls on one session are
served in order of arrival, one at a time. A message is applied whole or not at all: the engine works in a
slot of the message's own, and only a message that ended well becomes the session's state and history.
Everything here runs in the event loop's thread; the engine's thread only hands back messages that ended.

`service.py` checks what callers send before it comes here; `engine.py` runs what leaves here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import structlog

from ntm.tensor import Array
from server.engine import Message
from server.errors import (
    ModelNotFoundError,
    NoFreeSlotError,
    QueueFullError,
    RequestIdReusedError,
    ServingError,
    SessionExistsError,
    SessionExpiredError,
    SessionIdRetiredError,
    SessionNotFoundError,
    StateNotKeptError,
)
from server.history import History
from server.model_runner import INITIAL_SLOT
from server.served_model import ServedModel

log = structlog.get_logger()

RETIREMENT_S = 24 * 3600


@dataclass(eq=False, slots=True)
class StepResult:
    """The answer to a message."""

    outputs: Array
    """[T, ...output shape]."""
    next_step: int
    state: dict[str, Array]
    """By name, without the batch axis and in the graph's axes; empty unless it was asked for."""


@dataclass(eq=False)
class Session:
    """A scratch memory and its history."""

    session_id: str
    request_id: str
    model: ServedModel
    create_time_s: float
    last_use_time_s: float
    history: History
    slot: int = INITIAL_SLOT
    calls: deque[Call | _Group] = field(default_factory=deque)
    """Calls in order of arrival; the first is being served."""
    has_ended: bool = False

    @property
    def next_step(self) -> int:
        """Index of the next step."""
        return self.history.next_step


@dataclass(eq=False, slots=True)
class Call:
    """One call on one session, waiting or being served."""

    session: Session
    begin: Callable[[Call], None]
    """Called when its turn has come; ends the call, or gives it a message to wait for."""
    future: asyncio.Future[Any]
    """What its caller waits for; several calls can share one."""
    settle: Callable[[Any], None]
    """Called with the result, or the exception, unless the caller has left."""
    follows: Call | None = None
    """The call before it on its stream: if that one fails, this one is not begun."""
    message: Message | None = None
    has_failed: bool = False


@dataclass(eq=False, slots=True)
class _Group:
    """The part of a batch whose sessions have no other calls, so that they can share one message."""

    sessions: list[Session]
    message: Message


class Batch:
    """What the caller of several calls waits for: the result or the exception of each, when all have one."""

    def __init__(self, size: int) -> None:
        self.future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.calls: list[Call | _Group] = []
        self._results: list[Any] = [None] * size
        self._num_left = size

    def settle(self, index: int, result: object) -> None:
        """Note what became of one of them."""
        self._results[index] = result
        self._num_left -= 1
        if not self._num_left and not self.future.done():
            self.future.set_result(self._results)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that makes a session, so that a repeat is told from another request."""

    request_id: str
    """Its name, or ""."""
    content: tuple[object, ...]
    """Everything else it says."""


@dataclass(frozen=True, slots=True)
class _Retired:
    """A session that has ended, remembered so that its id is not used again too soon."""

    request_id: str
    error: type[SessionNotFoundError]
    end_time_s: float


class SessionManager:
    """All sessions of all models."""

    def __init__(self, models: Iterable[ServedModel], now_s: Callable[[], float] = time.time) -> None:
        """Serve `models`; `now_s` gives the time in seconds since the epoch."""
        self.models = {(served.model.name, served.model.version): served for served in models}
        self._now_s = now_s
        self._sessions: dict[str, Session] = {}
        self._retired: dict[str, _Retired] = {}
        self._requests: dict[str, tuple[_Request, str]] = {}
        """By request id, the request and the id of the session that it made."""

    def model(self, name: str, version: int | None) -> ServedModel:
        """A model by name; without a version the newest.

        Raises:
            ModelNotFoundError: there is none.
        """
        if version is None:
            version = max((v for n, v in self.models if n == name), default=None)
        served = self.models.get((name, version)) if version is not None else None
        if served is None:
            labels = sorted(f"{n}/{v}" for n, v in self.models)
            raise ModelNotFoundError(name, version, labels)
        return served

    def get(self, session_id: str) -> Session:
        """A session by id.

        Raises:
            SessionNotFoundError: it was never created, or it was deleted.
            SessionExpiredError: it ended by its idle limit.
        """
        session = self._sessions.get(session_id)
        if session is None:
            retired = self._retired.get(session_id)
            raise (retired.error if retired else SessionNotFoundError)(session_id)
        return session

    def page(self, after: str, size: int, model_name: str) -> tuple[list[Session], bool]:
        """Up to `size` sessions with ids after `after`, ascending, and whether there are more."""
        ids = sorted(
            i for i, s in self._sessions.items() if not model_name or s.model.model.name == model_name
        )
        start = bisect_right(ids, after)
        return [self._sessions[i] for i in ids[start : start + size]], len(ids) > start + size

    def create(self, model_name: str, version: int | None, session_id: str, request_id: str) -> Session:
        """Create a session in the initial state, or return the one that this request made before.

        Args:
            model_name: name of the model.
            version: version of the model, or None for the newest.
            session_id: id of the session, or "" to have one made.
            request_id: names the request, or "".

        Raises:
            ModelNotFoundError, SessionExistsError, SessionIdRetiredError, RequestIdReusedError, NoFreeSlotError.
        """
        request = _Request(request_id, ("create", model_name, version, session_id))
        return self._repeated(request) or self._add(self.model(model_name, version), session_id, request)

    async def fork(
        self, source_session_id: str, at_step: int | None, session_id: str, request_id: str
    ) -> Session:
        """Copy a session as it is when its turn comes; both hold the same slot until one of them steps.

        Raises:
            As `create`; SessionNotFoundError, StepTooOldError, StepGapError, QueueFullError.
        """

        request = _Request(request_id, ("fork", source_session_id, at_step, session_id))

        def begin(call: Call) -> None:
            # Once more: the first of two may have waited in this line before the second.
            if repeated := self._repeated(request):
                return self._end(call, repeated)
            source = call.session
            if at_step is not None:
                source.history.check_is_at(at_step)
            copy = self._add(source.model, session_id, request, source.next_step)
            copy.slot = source.model.slots.hold(source.slot)
            return self._end(call, copy)

        if repeated := self._repeated(request):
            return repeated
        forked: Session = await self.finish(self._enter(self.get(source_session_id), begin))
        return forked

    async def delete(self, session_id: str, allow_missing: bool) -> None:
        """End a session after the calls that wait on it, and retire its id.

        Raises:
            SessionNotFoundError: unless `allow_missing`. QueueFullError.
        """

        def begin(call: Call) -> None:
            self._retire(call.session, SessionNotFoundError)
            self._end(call, None)

        try:
            await self.finish(self._enter(self.get(session_id), begin))
        except SessionNotFoundError:
            if not allow_missing:
                raise

    async def reset(self, session_id: str, at_step: int | None) -> Session:
        """Put a session back to the initial state; a repeat of a reset made before changes nothing.

        Raises:
            SessionNotFoundError, StepTooOldError, StepGapError, QueueFullError.
        """

        def begin(call: Call) -> None:
            session = call.session
            step = session.next_step if at_step is None else at_step
            if not session.history.was_reset_at(step):
                session.history.check_is_at(step)
                self._move(session, INITIAL_SLOT)
                session.history.add_reset()
            self._end(call, session)

        session: Session = await self.finish(self._enter(self.get(session_id), begin))
        return session

    def step(
        self,
        session: Session,
        inputs: Array,
        first_step: int | None,
        wants_state: bool = False,
        follows: Call | None = None,
        batch: tuple[Batch, int] | None = None,
    ) -> Call:
        """Run a message, or answer it from the records where it repeats one; `finish` gives its StepResult.

        Args:
            session: the session.
            inputs: [T, ...input shape], T at least 1, checked.
            first_step: index of the first input, or None to run it as the next.
            wants_state: whether to return the state after the last step.
            follows: the call before it on its stream, if there is one.
            batch: whose call it is and at which index, if it is not answered by itself.

        Raises (at once or through the future): SessionNotFoundError, QueueFullError, StepGapError, StepTooOldError,
            InputMismatchError, StateNotKeptError, StepFailedError, OutputNotFiniteError.
        """

        def begin(call: Call) -> None:
            session = call.session
            known = session.history.outputs_of(inputs, first_step)
            new_inputs = inputs[len(known) :]
            if len(new_inputs) == 0:
                end_step = (first_step or 0) + len(inputs)
                if not wants_state:
                    return self._end(call, StepResult(known, end_step, {}))
                if end_step != session.next_step or session.history.was_reset_at(end_step):
                    raise StateNotKeptError(end_step - 1, session.next_step)
            return self._run(call, new_inputs, known, wants_state)

        return self._enter(session, begin, needs_device=True, follows=follows, batch=batch)

    def step_each(
        self, sessions: Sequence[Session | ServingError], inputs: Array, first_steps: Sequence[int]
    ) -> Batch:
        """Run the steps of several sessions, each as `step` does; `finish` gives each one's result or exception.

        Args:
            sessions: S sessions, none twice; where there is none, why.
            inputs: [S, T, ...input shape], T at least 1, checked.
            first_steps: for each session the index of its first input, or empty.
        """
        batch = Batch(len(sessions))
        together: dict[ServedModel, list[int]] = {}
        for index, session in enumerate(sessions):
            if not isinstance(session, Session):
                batch.settle(index, session)
                continue
            served, first_step = session.model, first_steps[index] if first_steps else None
            is_next = first_step is None or first_step == session.history.next_step
            if is_next and not session.calls and served.num_pending < served.limits.max_pending_messages:
                served.num_pending += 1
                together.setdefault(served, []).append(index)
                continue
            try:
                self.step(session, inputs[index].copy(), first_step, batch=(batch, index))
            except ServingError as error:
                batch.settle(index, error)
        for served, indices in together.items():
            size = served.runner.max_batch_size
            for start in range(0, len(indices), size):
                self._run_together(batch, served, indices[start : start + size], sessions, inputs)
        return batch

    async def state(self, session_id: str) -> StepResult:
        """A session's state after the calls that wait before this one: a message of no steps.

        Raises:
            SessionNotFoundError, QueueFullError.
        """

        def begin(call: Call) -> None:
            model = call.session.model.model
            self._run(call, model.no_inputs, model.no_outputs, wants_state=True)

        result: StepResult = await self.finish(self._enter(self.get(session_id), begin, needs_device=True))
        return result

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

    def withdraw(self, calls: Iterable[Call | _Group]) -> None:
        """The caller has left: take the calls out that have not begun; the others run to their end."""
        for call in calls:
            if isinstance(call, _Group):
                self._withdraw_group(call)
                continue
            if not call.future.cancel() and not call.future.cancelled():
                call.future.exception()  # nobody else will ask, and asyncio would complain
            self._withdraw(call)

    def expire_idle(self) -> None:
        """End the sessions that no call has used for their model's idle limit."""
        now_s = self._now_s()
        for session in [*self._sessions.values()]:
            limit_s = session.model.limits.idle_limit_s
            if limit_s is not None and not session.calls and now_s - session.last_use_time_s >= limit_s:
                log.info("session expired", session_id=session.session_id, idle_limit_s=limit_s)
                self._retire(session, SessionExpiredError)

    # One session's calls, in order.

    def _enter(
        self,
        session: Session,
        begin: Callable[[Call], None],
        needs_device: bool = False,
        follows: Call | None = None,
        batch: tuple[Batch, int] | None = None,
    ) -> Call:
        """Put a call in its session's line.

        A call that neither needs the device nor has to wait for another is never too many.
        """
        served = session.model
        must_wait = needs_device or session.calls
        if must_wait and served.num_pending >= served.limits.max_pending_messages:
            raise QueueFullError(served.model.label, served.limits.max_pending_messages)
        served.num_pending += 1
        if batch is None:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            call = Call(session, begin, future, partial(_settle, future), follows)
        else:
            call = Call(session, begin, batch[0].future, partial(batch[0].settle, batch[1]), follows)
            batch[0].calls.append(call)
        session.calls.append(call)
        if len(session.calls) == 1:
            self._serve(session)
        return call

    def _serve(self, session: Session) -> None:
        """Begin calls until one has a message to wait for."""
        while session.calls and (call := session.calls[0]).message is None:
            assert isinstance(call, Call)
            if call.future.cancelled() or (call.follows is not None and call.follows.has_failed):
                call.has_failed = True
                self._leave(call)
                continue
            if session.has_ended:
                self._fail(call, SessionNotFoundError(session.session_id))
                continue
            try:
                call.begin(call)
            except Exception as error:  # a bug in one call must not keep the others of its session waiting
                self._fail(call, error)

    def _end(self, call: Call, result: object) -> None:
        """Answer the call being served."""
        self._leave(call)
        call.settle(result)

    def _fail(self, call: Call, error: Exception) -> None:
        call.has_failed = True
        self._leave(call)
        call.settle(error)

    def _leave(self, call: Call) -> None:
        session = call.session
        session.calls.popleft()
        call.follows = None  # or a stream would keep all its calls alive
        session.last_use_time_s = self._now_s()
        session.model.num_pending -= 1

    def _withdraw(self, call: Call) -> None:
        session = call.session
        if call not in session.calls:
            return
        if call.message is None:
            session.calls.remove(call)
            session.model.num_pending -= 1
        elif session.model.withdraw(call.message):
            session.model.slots.release(call.message.write_slots[0])
            self._leave(call)
            self._serve(session)

    def _withdraw_group(self, group: _Group) -> None:
        served = group.sessions[0].model
        if group.message.has_ended or not served.withdraw(group.message):
            return
        for slot in group.message.write_slots:
            served.slots.release(slot)
        self._disband(group)

    def _disband(self, group: _Group) -> None:
        """The message of a group has ended or is withdrawn: it is the turn of who waits behind it."""
        now_s = self._now_s()
        group.sessions[0].model.num_pending -= len(group.sessions)
        for session in group.sessions:
            session.calls.popleft()
            session.last_use_time_s = now_s
            if session.calls:
                self._serve(session)

    # Messages.

    def _run(self, call: Call, inputs: Array, known_outputs: Array, wants_state: bool) -> None:
        """Send a message for the call; its answer is the outputs known and the new ones."""
        session = call.session
        served = session.model
        no_outputs = served.model.no_outputs
        outputs = np.empty((len(inputs), *no_outputs.shape[1:]), no_outputs.dtype)
        write_slot = served.slots.take() if len(inputs) else INITIAL_SLOT

        def on_ended(message: Message) -> None:
            if message.errors:
                served.slots.release(write_slot)
                self._fail(call, message.errors[0])
            else:
                if len(inputs):
                    self._apply(session, write_slot, inputs, outputs)
                joined = np.concatenate([known_outputs, outputs]) if len(known_outputs) else outputs
                state = {name: values[0] for name, values in (message.state or {}).items()}
                self._end(call, StepResult(joined, session.next_step, state))
            if session.calls:
                self._serve(session)

        call.message = Message(
            [session.session_id],
            [session.history.next_step],
            inputs[np.newaxis],
            outputs[np.newaxis],
            [session.slot],
            [write_slot],
            wants_state,
            on_ended,
        )
        served.submit(call.message)

    def _run_together(
        self,
        batch: Batch,
        served: ServedModel,
        indices: list[int],
        all_sessions: Sequence[Session | ServingError],
        all_inputs: Array,
    ) -> None:
        """Send one message for the sessions of a batch at these indices, which have no other calls."""
        sessions = [cast(Session, all_sessions[index]) for index in indices]
        inputs = all_inputs[indices]
        no_outputs = served.model.no_outputs
        outputs = np.empty((*inputs.shape[:2], *no_outputs.shape[1:]), no_outputs.dtype)
        write_slots = [served.slots.take() for _ in sessions]

        def on_ended(message: Message) -> None:
            results: list[StepResult | ServingError] = []
            for row, (session, write_slot) in enumerate(zip(sessions, write_slots, strict=True)):
                if row in message.errors:
                    served.slots.release(write_slot)
                    results.append(message.errors[row])
                    continue
                # Copies, since the session keeps them on record, and must not keep the whole batch alive with them.
                row_outputs = outputs[row].copy()
                self._apply(session, write_slot, inputs[row].copy(), row_outputs)
                results.append(StepResult(row_outputs, session.history.next_step, {}))
            # Only now, since whose turn it is next sees what has become of the session.
            self._disband(group)
            for index, result in zip(indices, results, strict=True):
                batch.settle(index, result)

        group = _Group(
            sessions,
            Message(
                [session.session_id for session in sessions],
                [session.history.next_step for session in sessions],
                inputs,
                outputs,
                [session.slot for session in sessions],
                write_slots,
                on_ended=on_ended,
            ),
        )
        for session in sessions:
            session.calls.append(group)
        batch.calls.append(group)
        served.submit(group.message)

    def _apply(self, session: Session, slot: int, inputs: Array, outputs: Array) -> None:
        """Make a message that ended well part of its session: state, counter and record."""
        self._move(session, slot)
        session.history.add(inputs, outputs)

    def _move(self, session: Session, slot: int) -> None:
        session.model.slots.release(session.slot)
        session.slot = slot

    # Beginnings and ends.

    def _repeated(self, request: _Request) -> Session | None:
        """The session that this request made before, if it did."""
        made = self._requests.get(request.request_id)
        if made is None:
            return None
        first_request, session_id = made
        if first_request != request:
            raise RequestIdReusedError(request.request_id)
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionIdRetiredError(session_id)
        return session

    def _add(self, served: ServedModel, session_id: str, request: _Request, next_step: int = 0) -> Session:
        self._forget_retired()
        session_id = session_id or secrets.token_hex(16)
        if session_id in self._sessions:
            raise SessionExistsError(session_id)
        if session_id in self._retired:
            raise SessionIdRetiredError(session_id)
        if served.num_sessions >= served.limits.max_sessions:
            raise NoFreeSlotError(served.model.label, served.limits.max_sessions)
        now_s = self._now_s()
        history = History(served.model.no_outputs, served.limits.retry_window_steps, next_step)
        session = Session(session_id, request.request_id, served, now_s, now_s, history)
        self._sessions[session_id] = session
        served.num_sessions += 1
        if request.request_id:
            self._requests[request.request_id] = request, session_id
        return session

    def _retire(self, session: Session, error: type[SessionNotFoundError]) -> None:
        session.has_ended = True
        self._move(session, INITIAL_SLOT)
        session.model.num_sessions -= 1
        del self._sessions[session.session_id]
        self._retired[session.session_id] = _Retired(session.request_id, error, self._now_s())

    def _forget_retired(self) -> None:
        """Forget the sessions that ended long enough ago; the oldest come first."""
        while self._retired:
            session_id, retired = next(iter(self._retired.items()))
            if self._now_s() - retired.end_time_s < RETIREMENT_S:
                return
            del self._retired[session_id]
            self._requests.pop(retired.request_id, None)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
