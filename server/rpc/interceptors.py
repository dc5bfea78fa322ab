"""Interceptors: what happens around every rpc. Errors become statuses, and calls are counted.

`failures.py` says what is told of those that fail.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from time import perf_counter, time
from typing import Any, NoReturn

import grpc

from server.errors import InvalidInputError, ServerStoppingError, ServingError, UnauthenticatedError
from server.metrics import Metrics
from server.rpc import status
from server.rpc.failures import MOST_CHARACTERS_LOGGED, Failures
from server.rpc.tracing import Tracing, current_span
from server.security import Authenticator, calling

MALFORMED: Any = object()
"""In the place of a request whose bytes are no message of its kind."""

_FIRST_MESSAGE_S = 1.0
_KINDS = ("unary_unary", "unary_stream", "stream_stream")

_Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Answers what fails with its status, and a failure of ours with INTERNAL.

    It knows how many calls are in progress, and while the server stops it lets no new one in.
    """

    def __init__(
        self,
        metrics: Metrics,
        authenticator: Authenticator,
        failures: Failures,
        tracing: Tracing | None = None,
    ) -> None:
        self.failures, self.tracing = failures, tracing
        """For whoever answers calls past this."""
        self._metrics = metrics
        self._authenticator = authenticator
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self.num_calls = 0
        self._is_stopping = False
        self._all_done = asyncio.Event()
        self._watchers: set[asyncio.Task[Any]] = set()

    async def drain(self, timeout_s: float) -> bool:
        """Let no new call in, and wait for those in progress; says whether all ended in time."""
        self._is_stopping = True
        try:
            if self.num_calls:
                await asyncio.wait_for(self._all_done.wait(), timeout_s)
        except TimeoutError:
            return False
        finally:
            for task in self._watchers:
                task.cancel()
        return True

    @property
    def lets_in_directly(self) -> bool:
        """Whether calls need not be asked who they are from, nor be refused: a transport may begin them by itself."""
        return not self._is_stopping and not self._authenticator.tells_apart

    def note(self, rpc: str, code: grpc.StatusCode, start_s: float) -> None:
        """A call is over that a transport began by itself, and counted in `num_calls`."""
        self.num_calls -= 1
        if self._is_stopping and not self.num_calls:
            self._all_done.set()
        self._metrics.count_call(rpc, code.name, perf_counter() - start_s)

    def note_refused(self, rpc: str, told: status.Status, num_calls: int) -> None:
        """Calls were refused that were never let in."""
        self._metrics.count_call(rpc, told.code.name, None, num_calls)
        self._metrics.count_refusal(told.reason, num_calls)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of every rpc, once; a call that lacks its token is refused before its request is parsed."""
        method: str = handler_call_details.method
        if self._authenticator.needs_token and not _is_open_to_all(method):
            try:
                await self._authenticator.authenticate(handler_call_details.invocation_metadata, {})
            except UnauthenticatedError as error:
                handler = await continuation(handler_call_details)
                return None if handler is None else self._refusal(method.rpartition("/")[2], handler, error)
        wrapped = self._handlers.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = wrapped = self._traced(method, self._wrap(method, handler))
        return wrapped

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        if _is_open_to_all(method):
            return self._cut_when_stopping(handler)
        rpc = method.rpartition("/")[2]
        if handler.unary_stream is not None:
            return self._cut_when_stopping(self._counted(rpc, handler))
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._around(rpc, handler.stream_stream, is_stream=True),
                request_deserializer=_tolerant(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._around(rpc, handler.unary_unary),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _traced(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """A wrapped handler, with a span around each of its calls where the server is traced."""
        tracing = self.tracing
        if tracing is None or _is_open_to_all(method):
            return handler
        kind = next(kind for kind in _KINDS if getattr(handler, kind) is not None)
        handle: Callable[[Any, Any], Awaitable[Any]] = getattr(handler, kind)

        async def traced(request: Any, context: _Context) -> Any:
            with tracing.call(method, context.invocation_metadata() or ()):
                return await handle(request, context)

        wrapped: grpc.RpcMethodHandler[Any, Any] = getattr(grpc, f"{kind}_rpc_method_handler")(
            traced,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _refusal(
        self, rpc: str, handler: grpc.RpcMethodHandler[Any, Any], error: ServingError
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(_requests: Any, context: _Context) -> None:
            call = _Call(rpc)
            try:
                if handler.stream_stream is not None:
                    await _first_message(context)
                await self._abort(call, error, context)
            finally:
                self._metrics.count_call(call.rpc, call.code.name, perf_counter() - call.start_s)

        # Without a deserializer: the request stays bytes.
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(refuse)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)

    def _cut_when_stopping(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """For a health check that watches, for as long as its client likes: it ends after the drain."""
        if handler.unary_stream is not None:
            watch: Any = handler.unary_stream

            async def around(request: Any, context: _Context) -> None:
                task = asyncio.current_task()
                assert task is not None
                self._watchers.add(task)
                try:
                    await watch(request, context)
                except asyncio.CancelledError:
                    if not self._is_stopping:
                        raise
                    task.uncancel()
                    await _abort(status.of(ServerStoppingError()), context)
                finally:
                    self._watchers.discard(task)

            return grpc.unary_stream_rpc_method_handler(
                around,
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler

    def _counted(self, rpc: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """For a call that lasts as long as its client likes: as `_around`, but stopping does not wait for it."""

        async def around(request: Any, context: _Context) -> None:
            call = _Call(rpc)
            try:
                if self._is_stopping:
                    raise ServerStoppingError
                handle: Any = handler.unary_stream
                await self._handle(handle, request, context)
                call.code = grpc.StatusCode.OK
            except Exception as error:
                await self._abort(call, error, context, request)
            finally:
                self._metrics.count_call(call.rpc, call.code.name, perf_counter() - call.start_s)

        return grpc.unary_stream_rpc_method_handler(
            around,
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _around(self, rpc: str, handle: Any, is_stream: bool = False) -> Any:
        async def around(request: Any, context: _Context) -> Any:
            call = _Call(rpc)
            try:
                self.num_calls += 1
                if self._is_stopping:
                    if is_stream:
                        await _first_message(context)
                    raise ServerStoppingError
                response = await self._handle(handle, request, context)
                call.code = grpc.StatusCode.OK
            except Exception as error:
                await self._abort(call, error, context, request)
            finally:
                self._let_out(call)
            return response

        return around

    async def _handle(self, handle: Any, request: Any, context: _Context) -> Any:
        """Handle a call for whoever makes it."""
        if request is MALFORMED:
            raise malformed()
        authenticator = self._authenticator
        if not authenticator.tells_apart:
            return await handle(request, context)
        shown = {} if authenticator.needs_token else context.auth_context()
        caller = await authenticator.authenticate(context.invocation_metadata() or (), shown)
        self._metrics.count_principal_call(caller.principal.name)
        with calling(caller):
            if caller.expires_s == float("inf"):
                return await handle(request, context)
            try:
                async with asyncio.timeout(caller.expires_s - time()) as limit:
                    return await handle(request, context)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise UnauthenticatedError("what the call began with has expired meanwhile") from None

    async def _abort(self, call: _Call, error: Exception, context: _Context, request: Any = None) -> NoReturn:
        """End a call with the status of an error."""
        session_id = getattr(request, "session_id", "")[:MOST_CHARACTERS_LOGGED]
        metadata = context.invocation_metadata() or ()
        span = current_span()
        trace_id = "" if span is None else span.trace_id
        told = self.failures.tell(call.rpc, error, metadata, session_id=session_id, trace_id=trace_id)
        if span is not None:
            span.fail(told)
        call.code = told.code
        await _abort(told, context)

    def _let_out(self, call: _Call) -> None:
        self.note(call.rpc, call.code, call.start_s)


class _Call:
    """One call: when it began, and what became of it."""

    __slots__ = ("code", "rpc", "start_s")

    def __init__(self, rpc: str) -> None:
        self.rpc = rpc
        self.start_s = perf_counter()
        self.code = grpc.StatusCode.CANCELLED


def malformed() -> InvalidInputError:
    """What is said of a request whose bytes are no message of its kind."""
    return InvalidInputError("request", "its bytes are not a message of this rpc: see protos/ntm/v1")


def _tolerant(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """As a deserializer, but what cannot be read is answered as bad input is, and fills no log."""
    if deserializer is None:
        return None

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception:  # whatever protobuf finds
            return MALFORMED

    return deserialize


def _is_open_to_all(method: str) -> bool:
    """Health and reflection, which tell nothing of sessions."""
    return method.startswith("/grpc.")


async def _first_message(context: _Context) -> None:
    """Wait a moment for a stream's first message, before it is refused.

    A client by grpc.aio whose stream ends while it sends a message is told INTERNAL by its own library, in about one of
    ten calls, and not the status that was sent.
    """
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(context.read(), _FIRST_MESSAGE_S)


async def _abort(told: status.Status, context: _Context) -> NoReturn:
    await context.abort(told.code, told.message, tuple(told.trailing))
