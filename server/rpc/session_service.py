"""Session service: ntm.v1.SessionService. Check the request, call the sessions, build the answer.

`validation.py` holds the checks, `streaming.py` reads streams, `interceptors.py` turns errors into statuses.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from ntm.tensor import Array, to_message
from ntm.v1 import model_pb2, session_pb2, session_service_pb2, session_service_pb2_grpc
from server.errors import InvalidInputError, ServingError
from server.model.spec import StepModel, to_api
from server.rpc import validation
from server.rpc.access import Access
from server.rpc.failures import MOST_CHARACTERS_LOGGED, REQUEST_ID_KEY, Failures, request_id_of
from server.rpc.native import DirectCall
from server.rpc.streaming import EnteredStep, IdleStreams, ReadAhead
from server.rpc.tensors import fill_outputs
from server.rpc.tracing import current_span
from server.rpc.validation import RequestLimits
from server.rpc.watching import watch
from server.security import split_key
from server.sessions.following import Followed, followed
from server.sessions.info import SessionInfo
from server.sessions.manager import SessionManager
from server.sessions.queues import queue_too_slow
from server.sessions.request import BatchReply, ReplyTo, StepRequest, Waiter
from server.sessions.session import Session

_MAX_PAGE_SIZE = 1000
_DEFAULT_PAGE_SIZE = 100

_Context = grpc.aio.ServicerContext[Any, Any]

_SESSIONS_CLAIMED_FOR_A_MODEL = 64
"""At a time, where none of a batch is in memory: one tells the model, and more are claimed only if it does not live."""


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """ntm.v1.SessionService.

    A caller's ids become keys of its namespace here, and keys ids again: what is behind knows nothing of callers.
    """

    def __init__(
        self,
        sessions: SessionManager,
        limits: RequestLimits,
        access: Access,
        idle_streams: IdleStreams,
        failures: Failures,
    ) -> None:
        self._sessions = sessions
        self._failures = failures
        self._access = access
        self._executor = sessions.executor
        self._limits = limits
        self._idle_streams = idle_streams

    async def CreateSession(
        self, request: session_service_pb2.CreateSessionRequest, context: _Context
    ) -> session_service_pb2.CreateSessionResponse:
        new = self._new_keys(request.session_id, request.request_id)
        version = request.model_version if request.HasField("model_version") else None
        validation.check_message_bytes(request.ByteSize(), self._limits)
        given = validation.initial_state(request.initial_state)
        begin = partial(self._sessions.create, request.model_name, version, *new, given)
        session = await self._access.begin(begin, request.model_name, new[1])
        self._access.audit("session created", session.session_id)
        return session_service_pb2.CreateSessionResponse(session=self._message(session))

    async def GetSession(
        self, request: session_service_pb2.GetSessionRequest, context: _Context
    ) -> session_service_pb2.GetSessionResponse:
        session = await self._sessions.get(self._key("session_id", request.session_id, request.owner))
        return session_service_pb2.GetSessionResponse(session=self._message(session))

    async def ListSessions(
        self, request: session_service_pb2.ListSessionsRequest, context: _Context
    ) -> session_service_pb2.ListSessionsResponse:
        if not 0 <= request.page_size <= _MAX_PAGE_SIZE:
            raise InvalidInputError(
                "page_size", f"{request.page_size} must be 1 to {_MAX_PAGE_SIZE}, or 0 for 100"
            )
        namespace = self._access.namespace(request.owner, may_be_all=True)
        page, has_more = await self._sessions.page(
            namespace.first(_decode_page_token(request.page_token)),
            request.page_size or _DEFAULT_PAGE_SIZE,
            request.model_name,
        )
        num_found = len(page)
        page = [session for session in page if namespace.holds(session.session_id)]
        has_more = has_more and len(page) == num_found
        return session_service_pb2.ListSessionsResponse(
            sessions=[self._message(session) for session in page],
            next_page_token=_encode_page_token(namespace.shown(page[-1].session_id)) if has_more else "",
        )

    async def DeleteSession(
        self, request: session_service_pb2.DeleteSessionRequest, context: _Context
    ) -> session_service_pb2.DeleteSessionResponse:
        key = self._key("session_id", request.session_id, request.owner)
        await self._sessions.delete(key, request.allow_missing)
        self._access.audit("session deleted", key)
        return session_service_pb2.DeleteSessionResponse()

    async def ResetSession(
        self, request: session_service_pb2.ResetSessionRequest, context: _Context
    ) -> session_service_pb2.ResetSessionResponse:
        session = await self._sessions.reset(
            self._key("session_id", request.session_id),
            request.at_step if request.HasField("at_step") else None,
        )
        return session_service_pb2.ResetSessionResponse(session=self._message(session))

    async def Step(
        self, request: session_service_pb2.StepRequest, context: _Context
    ) -> session_service_pb2.StepResponse:
        entered = self.enter(request, await self._find(request.session_id))
        answer = session_service_pb2.StepResponse()
        fill_step_response(answer, entered.state_names, await self._finished(entered))
        return answer

    async def StreamSteps(  # type: ignore[override]  # gRPC takes this form too, its stubs do not
        self, _requests: AsyncIterator[session_service_pb2.StreamStepsRequest], context: _Context
    ) -> None:
        # Read from and written to directly: generators around each message cost more.
        ahead = ReadAhead(self._idle_streams, self._enter_next, context, self._limits.max_unanswered_steps)
        try:
            while (entered := await ahead.next()) is not None:
                answer = session_service_pb2.StreamStepsResponse(session_id=entered.session_id)
                fill_step_response(answer.step, entered.state_names, await entered.waiter.future)
                await context.write(answer)
        finally:
            for left in ahead.close():
                self._executor.cancel(left.request)
                left.waiter.future.cancel()  # what is dropped unanswered counts no more

    async def BatchStep(
        self, request: session_service_pb2.BatchStepRequest, context: _Context
    ) -> session_service_pb2.BatchStepResponse:
        validation.check_message_bytes(request.ByteSize(), self._limits)
        validation.check_num_sessions(len(request.session_ids), self._limits)
        ids, first_steps = [*request.session_ids], [*request.first_steps]
        if len(set(ids)) != len(ids):
            raise InvalidInputError(
                "session_ids", "a session stands twice: send its steps in one item, or one after another"
            )
        if len(first_steps) not in (0, len(ids)):
            raise InvalidInputError(
                "first_steps",
                f"{len(first_steps)} for {len(ids)} sessions: send one for each, or none",
            )
        given = validation.batch_inputs(request, len(ids), self._limits)
        keys = [*map(self._access.namespace("").key, ids)]
        found = await self._find_each(ids, keys)
        first = next((session for session in found if isinstance(session, Session)), None)
        if first is None:  # each has its error
            batch = BatchReply(ids, 0)
            for position, error in enumerate(found):
                assert isinstance(error, ServingError)
                batch.fail(position, error)
            return self._batch_message(batch, None, context)
        model = first.model.model
        steps = validation.batch_steps(given, model, self._limits)

        def check(session: Session) -> None:
            if session.model is first.model:  # as most are
                return
            validation.check_alike("session_ids", session.model.model.spec, model.spec)

        alike = [_if_alike(session, check) for session in found]
        batch = self._access.begin_steps(
            first.model, steps.size, lambda: self._sessions.admit_each(keys, alike, steps, first_steps, check)
        )
        return self._batch_message(await self._sessions.finish_each(batch), model, context)

    async def GetState(
        self, request: session_service_pb2.GetStateRequest, context: _Context
    ) -> session_service_pb2.GetStateResponse:
        session = await self._find(request.session_id, request.owner)
        spec = session.model.model.spec
        names = validation.check_state_names("names", request.names, spec)
        names = names or [state.input_name for state in spec.states]
        validation.check_answer_size("names", 0, names, session.model.model, self._limits)
        next_step, state = await self._sessions.state(session)
        return session_service_pb2.GetStateResponse(
            next_step=next_step,
            state=_state_messages(names, state, spec),
            approximate=session.metadata.is_approximate,
        )

    async def WatchSession(  # type: ignore[override]  # gRPC takes this form too, its stubs do not
        self, request: session_service_pb2.WatchSessionRequest, context: _Context
    ) -> None:
        session = await self._find(request.session_id, request.owner)
        model = session.model.model
        names = validation.check_state_names("include_state", request.include_state, model.spec)
        validation.check_answer_size("include_state", 0, names, model, self._limits)
        await watch(self._sessions, session, names, self._limits.max_message_bytes, context)

    async def ForkSession(
        self, request: session_service_pb2.ForkSessionRequest, context: _Context
    ) -> session_service_pb2.ForkSessionResponse:
        new = self._new_keys(request.session_id, request.request_id)
        source = self._key("source_session_id", request.source_session_id)
        at_step = request.at_step if request.HasField("at_step") else None
        session = await self._access.begin(partial(self._sessions.fork, source, at_step, *new), "", new[1])
        self._access.audit("session forked", session.session_id, source=source)
        return session_service_pb2.ForkSessionResponse(session=self._message(session))

    async def ExportSession(
        self, request: session_service_pb2.ExportSessionRequest, context: _Context
    ) -> session_service_pb2.ExportSessionResponse:
        session = await self._find(request.session_id, request.owner)
        names = [state.input_name for state in session.model.model.spec.states]
        validation.check_answer_size("session_id", 0, names, session.model.model, self._limits)
        snapshot = await self._sessions.export(session)
        self._access.audit("session exported", session.session_id)
        return session_service_pb2.ExportSessionResponse(snapshot=snapshot)

    async def ImportSession(
        self, request: session_service_pb2.ImportSessionRequest, context: _Context
    ) -> session_service_pb2.ImportSessionResponse:
        validation.check_message_bytes(request.ByteSize(), self._limits)
        new = self._new_keys(request.session_id, request.request_id)
        begin = partial(self._sessions.import_snapshot, request.snapshot, *new)
        session = await self._access.begin(begin, "", new[1])
        self._access.audit("session imported", session.session_id)
        return session_service_pb2.ImportSessionResponse(session=self._message(session))

    def refuses_steps(self) -> ServingError | None:
        """Why steps of any session are refused now, whatever they are, or None."""
        models = [*self._sessions.models]
        if models and all(served.engine.wait_limit.is_reached for served in models):
            return queue_too_slow(models[0])
        return None

    def step_directly(self, calls: Sequence[DirectCall]) -> list[DirectCall]:
        """Step, for a transport that hands calls over as they come together; returns those that are no plain case."""
        if self._access.counts_steps:
            return [*calls]
        in_memory, namespace = self._sessions.in_memory, self._access.namespace("")
        left, admitted = list[DirectCall](), list[StepRequest]()
        for call in calls:
            try:
                request = session_service_pb2.StepRequest.FromString(call.payload)
                session = in_memory.get(namespace.key(request.session_id))
                if session is None:
                    left.append(call)
                    continue
                if session.model.engine.wait_limit.is_reached:
                    raise queue_too_slow(session.model)
                reply = _DirectStep(call)
                reply_to = reply if call.span is None else Followed(reply, call.span)
                steps, reply.state_names = self._step_request(request, session, reply_to)
            except DecodeError:
                left.append(call)
            except ServingError as error:
                call.fail(error)
            else:
                call.on_cancel = partial(self._executor.cancel, steps)
                admitted.append(steps)
        self._executor.admit(admitted)
        return left

    def enter(
        self,
        request: session_service_pb2.StepRequest,
        session: Session,
        follows: EnteredStep | None = None,
    ) -> EnteredStep:
        """Check a request for steps of a session, and admit it."""
        waiter = Waiter()
        follows_request = follows.request if follows else None
        steps, names = self._step_request(request, session, followed(waiter), follows_request)
        entered = EnteredStep(steps, waiter, names)

        def admit() -> EnteredStep:
            self._executor.admit([steps])
            return entered

        return self._access.begin_steps(session.model, steps.caller_inputs.size, admit)

    def _step_request(
        self,
        request: session_service_pb2.StepRequest,
        session: Session,
        reply_to: ReplyTo,
        follows: StepRequest | None = None,
    ) -> tuple[StepRequest, list[str]]:
        """Check a request for steps of a session; returns it, and the states that it asks for."""
        validation.check_message_bytes(request.ByteSize(), self._limits)
        model = session.model.model
        inputs = validation.step_inputs(request, model, self._limits)
        names = validation.check_state_names("include_state", request.include_state, model.spec)
        traced = validation.check_state_names("trace_state", request.trace_state, model.spec)
        field = "trace_state" if traced else "include_state" if names else "inputs.shape"
        validation.check_answer_size(field, len(inputs), names, model, self._limits, traced=traced)
        steps = StepRequest(
            [session],
            inputs[None],
            (request.first_step,) if request.HasField("first_step") else None,
            reply_to,
            wants_state=bool(names),
            follows=follows,
        )
        steps.trace_names = traced
        return steps, names

    async def _enter_next(
        self, request: session_service_pb2.StepRequest, follows: EnteredStep | None
    ) -> EnteredStep:
        return self.enter(request, await self._find(request.session_id), follows)

    async def _finished(self, entered: EnteredStep) -> StepRequest:
        try:
            return await entered.waiter.future
        except asyncio.CancelledError:
            self._executor.cancel(entered.request)
            raise

    def _key(self, field: str, session_id: str, owner: str = "") -> str:
        """The key of a session, where the caller may look."""
        return self._access.namespace(owner).key(validation.check_id(field, session_id))

    def _new_keys(self, session_id: str, request_id: str) -> tuple[str, str]:
        """The keys of a session that is to begin, and of the request for it; either may be without an id."""
        namespace = self._access.namespace("")
        return (
            namespace.key(validation.check_id("session_id", session_id, may_be_empty=True)),
            namespace.request_key(validation.check_id("request_id", request_id, may_be_empty=True)),
        )

    async def _find(self, session_id: str, owner: str = "") -> Session:
        """A session that can be called, from memory or from the store."""
        key = self._access.namespace(owner).key(session_id)
        session = self._sessions.in_memory.get(key)
        if session is not None:
            return session
        validation.check_id("session_id", session_id)
        return await self._sessions.find(key)

    async def _find_each(
        self, ids: Sequence[str], keys: Sequence[str]
    ) -> list[Session | ServingError | None]:
        """The sessions that are in memory, the first at least, since the inputs are held against its model."""
        in_memory = self._sessions.in_memory
        found: list[Session | ServingError | None] = [*map(in_memory.get, keys)]
        if None not in found:
            return found
        has_model = any(found)
        for index, session_id in enumerate(ids):
            if found[index] is None:
                try:
                    validation.check_id("session_ids", session_id)
                except ServingError as error:
                    found[index] = error
        missing = [index for index, session in enumerate(found) if session is None]
        first, size = 0, 1
        while not has_model and first < len(missing):
            asked, first, size = missing[first : first + size], first + size, _SESSIONS_CLAIMED_FOR_A_MODEL
            refused = await self._sessions.ownership.claim_each([keys[index] for index in asked])
            for index in asked:
                found[index] = refused.get(keys[index])
                if found[index] is None and not has_model:
                    try:
                        found[index] = await self._sessions.find(keys[index])
                        has_model = True
                    except ServingError as error:
                        found[index] = error
        return [session or in_memory.get(keys[index]) for index, session in enumerate(found)]

    def _batch_message(
        self, result: BatchReply, model: StepModel | None, context: _Context
    ) -> session_service_pb2.BatchStepResponse:
        """What became of a batch; its items that failed have the id of the call."""
        response = session_service_pb2.BatchStepResponse(
            next_steps=result.next_steps, approximate=sorted(result.approximate)
        )
        named = (
            [(REQUEST_ID_KEY, request_id_of(context.invocation_metadata() or ()))] if result.errors else ()
        )
        span = current_span() if result.errors else None
        trace_id = "" if span is None else span.trace_id
        for index, error in sorted(result.errors.items()):
            session_id = split_key(result.session_ids[index])[1][:MOST_CHARACTERS_LOGGED]
            told = self._failures.tell(
                "BatchStep", error, named, index=index, session_id=session_id, trace_id=trace_id
            )
            response.errors.add(
                index=index,
                code=told.code.value[0],
                reason=told.reason,
                message=told.message,
                metadata={**told.metadata, "request_id": told.request_id},
            )
        if result.outputs is not None and model is not None:
            fill_outputs(response, result.outputs, model)
        return response

    def _message(self, session: SessionInfo) -> session_pb2.Session:
        return session_pb2.Session(
            session_id=split_key(session.session_id)[1],
            owner=self._access.owner_of(session.session_id),
            model_name=session.model_name,
            model_version=session.model_version,
            next_step=session.next_step,
            create_time=_timestamp(session.create_time_s),
            last_use_time=_timestamp(session.last_use_time_s),
            expire_time=None if session.expire_time_s is None else _timestamp(session.expire_time_s),
            store=self._sessions.store.backend.kind,
            approximate=session.is_approximate,
        )


class _DirectStep:
    """A Step that is answered as soon as it is known."""

    __slots__ = ("_call", "state_names")

    def __init__(self, call: DirectCall) -> None:
        self._call = call
        self.state_names: list[str] = []

    def reply(self, request: StepRequest) -> None:
        """Answer the call."""
        answer = session_service_pb2.StepResponse()
        try:
            fill_step_response(answer, self.state_names, request)
        except Exception as error:
            self._call.fail(error, split_key(request.session_ids[0])[1])
        else:
            self._call.respond(answer.SerializeToString())

    def add(self, request: StepRequest) -> None:
        """One session's request is never divided."""
        raise AssertionError


def fill_step_response(
    answer: session_service_pb2.StepResponse, state_names: Sequence[str], request: StepRequest
) -> None:
    """Say what became of steps.

    Raises:
        ServingError: they failed.
    """
    result, session = request.result(), request.sessions[0]
    model = session.model.model
    fill_outputs(answer, result.outputs, model)
    answer.next_step = result.next_step
    answer.approximate = session.metadata.is_approximate
    if state_names:
        answer.state.extend(_state_messages(state_names, result.state, model.spec))
    if request.trace_names:
        trace = {name: np.stack([state[name][0] for state in request.trace]) for name in request.trace_names}
        answer.trace.extend(_state_messages(request.trace_names, trace, model.spec, num_leading_axes=1))


def _if_alike(
    session: Session | ServingError | None, check: Callable[[Session], None]
) -> Session | ServingError | None:
    if isinstance(session, Session):
        try:
            check(session)
        except ServingError as error:
            return error
    return session


def _timestamp(time_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(time_s * 1e9))
    return timestamp


def _state_messages(
    names: Iterable[str], state: Mapping[str, Array], spec: model_pb2.ModelSpec, num_leading_axes: int = 0
) -> list[session_pb2.StateTensor]:
    """State tensors as the API shows them, the leading axes as they are."""
    specs = {state_spec.input_name: state_spec for state_spec in spec.states}
    return [
        session_pb2.StateTensor(
            name=name,
            role=specs[name].role,
            value=to_message(to_api(specs[name], state[name], num_leading_axes)),
        )
        for name in names
    ]


def _encode_page_token(session_id: str) -> str:
    return base64.urlsafe_b64encode(session_id.encode()).decode()


def _decode_page_token(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError:  # not ASCII, not base64, not UTF-8
        raise InvalidInputError("page_token", "send next_page_token of the page before, unchanged") from None
