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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
class BatchResult:
    """What became of the steps of several sessions."""

    outputs: Array | None
    """[S, T, ...output shape], zeros where a session failed; None if all did."""
    next_steps: list[int]
    """0 where a session failed."""
    errors: dict[int, BaseException]
    """By index."""


class Batch:
    """What the caller of several sessions' steps waits for: what became of each, when all have ended."""

    def __init__(self, num_sessions: int, num_steps: int) -> None:
        self.future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
        self.calls: list[Call | _Group] = []
        self._size = (num_sessions, num_steps)
        self._result = BatchResult(None, [0] * num_sessions, {})
        self._num_left = num_sessions

    def call(self, session: Session, begin: Callable[[Call], None], index: int) -> Call:
        """A call for one of the sessions."""
        call = Call(session, begin, self.future, partial(self.settle, index))
        self.calls.append(call)
        return call

    def settle(self, index: int, result: object) -> None:
        """Note what became of one session's steps."""
        if isinstance(result, StepResult):
            self._outputs_like(result.outputs)[index] = result.outputs
            self._result.next_steps[index] = result.next_step
        else:
            assert isinstance(result, BaseException)
            self._result.errors[index] = result
        self._end(1)

    def settle_group(self, group: _Group, outputs: Array, errors: Mapping[int, ServingError]) -> None:
        """Note what became of a group's steps: outputs [its sessions, T, ...output shape], and errors by row."""
        if not errors and len(group.indices) == self._size[0]:
            self._result.outputs = outputs
            self._result.next_steps = [session.next_step for session in group.sessions]
            return self._end(len(group.indices))
        for row, (index, session) in enumerate(zip(group.indices, group.sessions, strict=True)):
            if row in errors:
                self._result.errors[index] = errors[row]
            else:
                self._outputs_like(outputs[row])[index] = outputs[row]
                self._result.next_steps[index] = session.next_step
        return self._end(len(group.indices))

    def _outputs_like(self, outputs: Array) -> Array:
        if self._result.outputs is None:
            self._result.outputs = np.zeros((*self._size, *outputs.shape[1:]), outputs.dtype)
        return self._result.outputs

    def _end(self, num_sessions: int) -> None:
        self._num_left -= num_sessions
        if not self._num_left and not self.future.done():
            self.future.set_result(self._result)


@dataclass(eq=False, slots=True)
class _Group:
    """Sessions of a batch that are served together, in one message, since nothing else is to be served before.

    It stands in the line of each of them: alone, or behind the same other group.
    """

    batch: Batch
    served: ServedModel
    indices: list[int]
    """Where the sessions stand in the batch."""
    sessions: list[Session]
    inputs: Array
    """[sessions, T, ...input shape]."""
    first_steps: Sequence[int]
    """As its caller says, or empty."""
    num_waiting: int = 0
    """Sessions whose turn has not come."""
    message: Message | None = None


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

        begin = self._stepping(inputs, first_step, wants_state)
        return self._enter(session, begin, needs_device=True, follows=follows, batch=batch)

    def step_each(
        self, sessions: Sequence[Session | ServingError], inputs: Array, first_steps: Sequence[int]
    ) -> Batch:
        """Run the steps of several sessions, each as `step` does; `finish` gives a BatchResult.

        Args:
            sessions: S sessions, none twice; where there is none, why.
            inputs: [S, T, ...input shape], T at least 1, checked.
            first_steps: for each session the index of its first input, or empty.
        """
        batch = Batch(len(sessions), inputs.shape[1])
        together: dict[tuple[ServedModel, _Group | None], list[int]] = {}
        for index, session in enumerate(sessions):
            if not isinstance(session, Session):
                batch.settle(index, session)
                continue
            served, last = session.model, session.calls[-1] if session.calls else None
            if isinstance(last, Call):
                self._step_alone(batch, index, session, inputs, first_steps)
            elif served.num_pending >= served.limits.max_pending_messages:
                batch.settle(index, _queue_full(served))
            else:
                served.num_pending += 1
                together.setdefault((served, last), []).append(index)
        for (served, _), indices in together.items():
            size = served.runner.max_batch_size
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                group = _Group(
                    batch,
                    served,
                    part,
                    [cast(Session, sessions[index]) for index in part],
                    inputs[part],
                    [first_steps[index] for index in part] if first_steps else (),
                )
                self._enter_group(group)
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
            raise _queue_full(served)
        served.num_pending += 1
        if batch is None:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            call = Call(session, begin, future, partial(_settle, future), follows)
        else:
            call = batch[0].call(session, begin, batch[1])
        session.calls.append(call)
        if len(session.calls) == 1:
            self._serve(session)
        return call

    def _serve(self, session: Session) -> None:
        """Begin calls until one has a message to wait for; to be called when another has become the first."""
        while session.calls and (call := session.calls[0]).message is None:
            if isinstance(call, _Group):
                call.num_waiting -= 1
                if not call.num_waiting:
                    self._begin_group(call)
                return
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
        if group.message is None:
            behind = [session for session in group.sessions if session.calls[0] is group]
            group.served.num_pending -= len(group.sessions)
            for session in group.sessions:
                session.calls.remove(group)
            for session in behind:
                self._serve(session)
        elif not group.message.has_ended and group.served.withdraw(group.message):
            for slot in group.message.write_slots:
                group.served.slots.release(slot)
            self._disband(group)

    def _disband(self, group: _Group) -> None:
        """The message of a group has ended or is withdrawn: it is the turn of who waits behind it."""
        now_s = self._now_s()
        group.served.num_pending -= len(group.sessions)
        for session in group.sessions:
            session.calls.popleft()
            session.last_use_time_s = now_s
            if session.calls:
                self._serve(session)

    # Messages.

    def _stepping(
        self, inputs: Array, first_step: int | None, wants_state: bool = False
    ) -> Callable[[Call], None]:
        """How a call begins that runs some steps, or answers them from the records."""

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

        return begin

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
            served.slots.shared([session.slot]),
            wants_state,
            on_ended,
        )
        served.submit(call.message)

    def _step_alone(
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

    def _enter_group(self, group: _Group) -> None:
        group.batch.calls.append(group)
        for session in group.sessions:
            group.num_waiting += bool(session.calls)
            session.calls.append(group)
        if not group.num_waiting:
            self._begin_group(group)

    def _begin_group(self, group: _Group) -> None:
        """Send a group's message; a session that is not where the steps begin is served by itself."""
        elsewhere = [
            row
            for row, (session, first_step) in enumerate(zip(group.sessions, group.first_steps, strict=False))
            if first_step != session.next_step
        ]
        others = self._split_off(group, elsewhere) if elsewhere else []
        if group.sessions:
            self._run_group(group)
        else:
            group.batch.calls.remove(group)
        for session in others:
            self._serve(session)

    def _split_off(self, group: _Group, rows: list[int]) -> list[Session]:
        """Put calls of their own in the place of the group for some of its sessions; returns these."""
        apart = set(rows)
        for row in rows:
            first_step = group.first_steps[row] if group.first_steps else None
            session, begin = group.sessions[row], self._stepping(group.inputs[row], first_step)
            session.calls[0] = group.batch.call(session, begin, group.indices[row])
        others = [group.sessions[row] for row in rows]
        kept = [row for row in range(len(group.sessions)) if row not in apart]
        group.sessions = [group.sessions[row] for row in kept]
        group.indices = [group.indices[row] for row in kept]
        group.inputs = group.inputs[kept]
        return others

    def _run_group(self, group: _Group) -> None:
        served, sessions, inputs = group.served, group.sessions, group.inputs
        no_outputs = served.model.no_outputs
        outputs = np.empty((*inputs.shape[:2], *no_outputs.shape[1:]), no_outputs.dtype)
        write_slots = [served.slots.take() for _ in sessions]

        def on_ended(message: Message) -> None:
            errors = message.errors
            for row, (session, slot) in enumerate(zip(sessions, write_slots, strict=True)):
                if row in errors:
                    served.slots.release(slot)
                else:
                    self._apply(session, slot, inputs[row], outputs[row])
            group.batch.settle_group(group, outputs, errors)
            # Only now, since whose turn it is next sees what has become of the session.
            self._disband(group)

        group.message = Message(
            [session.session_id for session in sessions],
            [session.next_step for session in sessions],
            inputs,
            outputs,
            slots := [session.slot for session in sessions],
            write_slots,
            served.slots.shared(slots),
            on_ended=on_ended,
        )
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
        model = served.model
        history = History(model.no_inputs, model.no_outputs, served.limits.retry_window_steps, next_step)
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


def _queue_full(served: ServedModel) -> QueueFullError:
    return QueueFullError(served.model.label, served.limits.max_pending_messages)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
