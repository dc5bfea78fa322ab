"""Native: gRPC whose HTTP/2 work runs outside the interpreter's lock, by pygrpc-native's low-level interface.

Plain calls arrive here in batches, as bytes. A method with a *direct* handler is given all calls of a batch at once and
answers them when it likes, without a coroutine for each; the others run as coroutines. What is no plain call (streams,
health, reflection) is served by a grpcio server behind it, through a Unix socket, with the same interceptor.

It has the part of `grpc.aio.Server` that `launch.py` uses. What it cannot do is not offered: `transport.choose` says
so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn, Protocol

import grpc
from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from server.errors import ServerOverloadedError, ServingError
from server.rpc import status
from server.rpc.interceptors import CallInterceptor
from server.rpc.tracing import CallSpan
from server.wait_limit import WaitLimit

_BATCH_SIZE = 256
_DRAIN_PAUSE_S = 0.01
_LINGER_S = 0.5
_FIRST_LOOK_S = 0.05
_BYTES_ACKNOWLEDGED = 120  # where tcpi_bytes_acked stands in Linux's struct tcp_info
_NO_AUTH: dict[str, list[bytes]] = {}

_Details = tuple[Sequence[tuple[str, str | bytes]], str, Any]
"""Of a call: its metadata, its caller's address, and its deadline."""


class DirectCall:
    """One plain call that waits for its answer, which its handler gives by `respond` or `fail`."""

    __slots__ = ("_server", "call_id", "details", "on_cancel", "payload", "rpc", "span", "start_s")

    def __init__(
        self, server: NativeServer, call_id: int, rpc: str, payload: bytes, details: _Details
    ) -> None:
        """Nothing is answered yet."""
        self._server = server
        self.call_id = call_id
        self.rpc = rpc
        self.payload = payload
        self.details = details
        self.span: CallSpan | None = None
        """Where it is traced."""
        self.start_s = perf_counter()
        self.on_cancel: Callable[[], None] | None = None
        """Called when the caller has left, or its deadline has passed."""

    def respond(self, answer: bytes) -> None:
        """Answer it."""
        self._server.finish(self, grpc.StatusCode.OK, answer)

    def fail(self, error: BaseException, session_id: str = "") -> None:
        """Answer it with the status of an error, which the log may name a session with."""
        trace_id = "" if self.span is None else self.span.trace_id
        told = self._server.failures.tell(
            self.rpc, error, self.details[0], session_id=session_id, trace_id=trace_id
        )
        if self.span is not None:
            self.span.fail(told)
        self._server.finish(self, told.code, told)


class DirectHandler(Protocol):
    """Answers plain calls of one method without coroutines, all that came together at once."""

    def __call__(self, calls: Sequence[DirectCall]) -> Sequence[DirectCall]:
        """Take calls; returns those that are to be handled as any other call."""


class _Context:
    """What a handler may ask of its call, as of grpcio's ServicerContext."""

    __slots__ = ("_metadata", "_peer")

    def __init__(self, metadata: Sequence[tuple[str, str | bytes]], peer: str) -> None:
        self._metadata = metadata
        self._peer = peer

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What the caller sent beside its request."""
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        """Nothing is known of a caller without TLS."""
        return _NO_AUTH

    def peer(self) -> str:
        """The caller's address."""
        return self._peer

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, bytes]] = ()
    ) -> NoReturn:
        """End the call with a status."""
        raise _AbortedError(code, details, trailing_metadata)


class _AbortedError(Exception):
    def __init__(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, bytes]]) -> None:
        super().__init__(details)
        self.code, self.details, self.trailing = code, details, trailing


class _CallDetails(grpc.HandlerCallDetails):
    def __init__(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self.method = method
        self.invocation_metadata = tuple(metadata)


class NativeServer:
    """Serves gRPC in the event loop that starts it."""

    def __init__(
        self,
        interceptor: CallInterceptor,
        fallback: grpc.aio.Server,
        max_receive_bytes: int,
        max_send_bytes: int,
        max_wait_s: float,
        max_concurrent_streams: int,
    ) -> None:
        """Nothing is served and nothing listens.

        Args:
            interceptor: runs around every call.
            fallback: serves what is no plain call; it has the same interceptor.
            max_receive_bytes: of one request.
            max_send_bytes: of one answer.
            max_wait_s: seconds that calls may wait for the event loop where they keep coming faster than it takes them.
            max_concurrent_streams: calls of one connection at a time.
        """
        self._interceptor = interceptor
        self.failures = interceptor.failures
        self._tracing = interceptor.tracing
        self._fallback = fallback
        self._max_receive_bytes = max_receive_bytes
        self._max_send_bytes = max_send_bytes
        self._wait_limit = WaitLimit(max_wait_s)
        self._max_concurrent_streams = max_concurrent_streams
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._direct: dict[str, DirectHandler] = {}
        self._never_refused = frozenset[str]()
        self._refusals: dict[str, Callable[[], ServingError | None]] = {}
        self._methods: list[str] = []
        self._front: NativeGrpcFront | None = None
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._in_progress: dict[int, DirectCall | asyncio.Task[None]] = {}
        self._last_answer_s = 0.0
        self._directory = tempfile.mkdtemp(prefix="ntm-")

    # What the generated code calls.

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Serve whatever handlers say; plain calls among them are registered as well."""
        self._fallback.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Serve a service's methods: plain calls here, the others behind."""
        self._fallback.add_registered_method_handlers(service, handlers)
        if not service.startswith("grpc."):
            for name, handler in handlers.items():
                if handler.unary_unary is not None:
                    self._handlers[f"/{service}/{name}"] = handler

    def never_refuse(self, methods: Iterable[str]) -> None:
        """Take calls of methods, /SERVICE/NAME, however many calls there are: probes, say."""
        self._never_refused = frozenset(methods)

    def add_direct_handler(
        self, method: str, handler: DirectHandler, refusal: Callable[[], ServingError | None]
    ) -> None:
        """Have a method, /SERVICE/NAME, answered without coroutines.

        Args:
            method: which.
            handler: answers.
            refusal: why calls that come now are not even to be read, or None.
        """
        self._direct[method] = handler
        self._refusals[method] = refusal

    # Life.

    def add_insecure_port(self, address: str) -> int:
        """Take a port; nothing is accepted before `start`. Returns its number.

        Raises:
            RuntimeError: the address cannot be had.
        """
        self._methods = [*self._handlers]
        try:
            self._front = NativeGrpcFront(
                address,
                [(method, False) for method in self._methods],
                io_threads=1,
                call_details=True,
                metrics=True,
                keepalive_permit_without_calls=False,
                max_concurrent_streams=self._max_concurrent_streams,
            )
        except OSError as error:
            raise RuntimeError(str(error)) from error
        return self._front.bound_port

    async def start(self) -> None:
        """Serve."""
        path = str(Path(self._directory) / "fallback")
        self._fallback.add_insecure_port(f"unix:{path}")
        await self._fallback.start()
        if self._front is None:  # no port was had: whatever comes is stopped at once
            return
        self._front.set_fallback(path)
        self._front.start()
        self._thread = threading.Thread(
            target=self._keep_receiving, args=(self._front,), name="gRPC calls", daemon=True
        )
        self._thread.start()

    @property
    def threads(self) -> list[threading.Thread]:
        """Those that must not end before `stop`."""
        return [] if self._thread is None else [self._thread]

    async def stop(self, grace: float | None) -> None:
        """Accept nothing more; what is in progress, and answers on their way, have so many seconds."""
        end_s = perf_counter() + (grace or 0)
        behind = asyncio.ensure_future(self._fallback.stop(grace))
        front = self._front
        if front is not None:
            await self._send_what_is_left(front, end_s)
            await asyncio.to_thread(front.close)
        for call in [*self._in_progress.values()]:
            if isinstance(call, asyncio.Task):
                call.cancel()
            elif call.on_cancel is not None:
                call.on_cancel()
        await behind
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _send_what_is_left(self, front: NativeGrpcFront, end_s: float) -> None:
        """Wait for the calls in progress and for their answers to leave.

        The package counts an answer as sent when it stands in the connection's buffer, and closes without emptying it.
        So the connections themselves are looked at: what a slow reader still takes, it gets.
        """
        num_acknowledged = await asyncio.to_thread(_num_bytes_acknowledged, front.bound_port)
        moved_s = max(self._last_answer_s, perf_counter() - _LINGER_S + _FIRST_LOOK_S)
        while (now_s := perf_counter()) < end_s:
            if self._in_progress or self._num_unsent(front):
                moved_s = now_s
            elif now_s - moved_s >= _LINGER_S:
                return
            await asyncio.sleep(_DRAIN_PAUSE_S)
            num_before, num_acknowledged = (
                num_acknowledged,
                await asyncio.to_thread(_num_bytes_acknowledged, front.bound_port),
            )
            if num_acknowledged > num_before:
                moved_s = perf_counter()

    @staticmethod
    def _num_unsent(front: NativeGrpcFront) -> int:
        """Calls whose answer has not wholly left."""
        methods = (front.metrics() or {"methods": {}})["methods"]
        return sum(
            method["started"] - sum(told["count"] for told in method["status"].values())
            for method in methods.values()
        )

    # Calls.

    def _keep_receiving(self, front: NativeGrpcFront) -> None:
        while (events := front.recv_batch_details(_BATCH_SIZE)) is not None:
            try:
                self._loop.call_soon_threadsafe(self._take, events, perf_counter())
            except RuntimeError:  # the loop was closed without `stop`
                front.close()
                return

    def _take(self, events: Sequence[tuple[Any, ...]], arrival_s: float) -> None:
        """Begin the calls that came together, and end those whose caller has left."""
        self._wait_limit.note(arrival_s, perf_counter())
        if self._wait_limit.is_reached:
            events = self._refuse_unread(events, ServerOverloadedError(self._wait_limit.limit_s))
        elif self._interceptor.lets_in_directly:
            for method, refusal in self._refusals.items():
                if (error := refusal()) is not None:
                    events = self._refuse_unread(events, error, method)
        direct: dict[str, list[DirectCall]] = {}
        for kind, call_id, method_id, payload, _, details in events:
            if kind == EVENT_CANCEL:
                self._cancel(call_id)
                continue
            method = self._methods[method_id]
            if len(payload) > self._max_receive_bytes:
                self._refuse_size(call_id, "request", len(payload), self._max_receive_bytes)
            elif method in self._direct and self._interceptor.lets_in_directly:
                call = DirectCall(self, call_id, method.rpartition("/")[2], payload, details)
                if self._tracing is not None:
                    call.span = self._tracing.begin(method, details[0])
                self._in_progress[call_id] = call
                self._interceptor.num_calls += 1
                direct.setdefault(method, []).append(call)
            else:
                self._begin(call_id, method, payload, details)
        for method, arrived in direct.items():
            calls = [
                call for call in arrived if call.call_id in self._in_progress
            ]  # whose caller has not left yet
            try:
                left = self._direct[method](calls)
            except Exception as error:
                for call in calls:
                    if call.call_id in self._in_progress:
                        call.fail(error)
                continue
            for call in left:
                del self._in_progress[call.call_id]
                self._interceptor.num_calls -= 1
                self._begin(call.call_id, method, call.payload, call.details)

    def _refuse_unread(
        self, events: Sequence[tuple[Any, ...]], error: ServingError, method: str = ""
    ) -> Sequence[tuple[Any, ...]]:
        """Refuse calls of a method, or of any, for next to nothing; returns the other events."""
        front, told = self._front, status.of(error, secrets.token_hex(8))
        assert front is not None
        code, message, trailing = told.code.value[0], told.message, told.trailing
        num_refused, others = Counter[str](), list[tuple[Any, ...]]()
        for event in events:
            called = "" if event[0] == EVENT_CANCEL else self._methods[event[2]]
            if called and (method == called or (not method and called not in self._never_refused)):
                num_refused[called] += 1
                front.fail(event[1], code, message, trailing_metadata=trailing)
            else:
                others.append(event)
        for called, num_calls in num_refused.items():
            self._interceptor.note_refused(called.rpartition("/")[2], told, num_calls)
        return others

    def _begin(self, call_id: int, method: str, payload: bytes, details: _Details) -> None:
        task = self._loop.create_task(self._handle(call_id, method, payload, details))
        self._in_progress[call_id] = task

    async def _handle(self, call_id: int, method: str, payload: bytes, details: _Details) -> None:
        front, (metadata, peer, _) = self._front, details
        assert front is not None

        async def registered(_: Any) -> grpc.RpcMethodHandler[Any, Any]:
            return self._handlers[method]

        try:
            intercepted = await self._interceptor.intercept_service(
                registered, _CallDetails(method, metadata)
            )
            assert intercepted is not None
            handle: Callable[[Any, Any], Awaitable[Any]] = intercepted.unary_unary  # type: ignore[assignment]
            deserialize = intercepted.request_deserializer
            request = payload if deserialize is None else deserialize(payload)
            serialize = self._handlers[method].response_serializer
            assert serialize is not None
            answer = serialize(await handle(request, _Context(metadata, peer)))
            if len(answer) > self._max_send_bytes:
                self._refuse_size(call_id, "answer", len(answer), self._max_send_bytes)
            else:
                front.respond(call_id, answer)
        except _AbortedError as aborted:
            front.fail(call_id, aborted.code.value[0], aborted.details, trailing_metadata=[*aborted.trailing])
        except asyncio.CancelledError:
            front.fail(call_id, grpc.StatusCode.CANCELLED.value[0], "cancelled")
        except Exception as error:
            told = self.failures.tell(method.rpartition("/")[2], error, metadata)
            front.fail(call_id, told.code.value[0], told.message, trailing_metadata=told.trailing)
        finally:
            self._last_answer_s = perf_counter()
            self._in_progress.pop(call_id, None)

    def finish(self, call: DirectCall, code: grpc.StatusCode, answer: bytes | status.Status) -> None:
        """Answer a direct call, once."""
        if self._in_progress.pop(call.call_id, None) is None:
            return
        front = self._front
        assert front is not None
        if isinstance(answer, status.Status):
            front.fail(call.call_id, code.value[0], answer.message, trailing_metadata=answer.trailing)
        elif len(answer) > self._max_send_bytes:
            self._refuse_size(call.call_id, "answer", len(answer), self._max_send_bytes)
        else:
            front.respond(call.call_id, answer)
        self._last_answer_s = perf_counter()
        self._interceptor.note(call.rpc, code, call.start_s)
        if call.span is not None:
            call.span.end(code)

    def _cancel(self, call_id: int) -> None:
        call = self._in_progress.get(call_id)
        if isinstance(call, asyncio.Task):
            call.cancel()
        elif call is not None:
            del self._in_progress[call_id]
            self._interceptor.note(call.rpc, grpc.StatusCode.CANCELLED, call.start_s)
            if call.span is not None:
                call.span.end(grpc.StatusCode.CANCELLED)
            if call.on_cancel is not None:
                call.on_cancel()

    def _refuse_size(self, call_id: int, what: str, num_bytes: int, most: int) -> None:
        assert self._front is not None
        text = f"the {what} has {num_bytes} bytes: at most {most} can be carried at a time"
        self._front.fail(call_id, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], text)


def _num_bytes_acknowledged(port: int) -> int:
    """How many bytes the other ends of this process's connections at a port have received; 0 where that is not told."""
    total = 0
    directory = Path("/proc/self/fd")
    for descriptor in directory.iterdir() if directory.exists() else []:
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                if (
                    connection.family in (socket.AF_INET, socket.AF_INET6)
                    and connection.getsockname()[1] == port
                ):
                    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKNOWLEDGED + 8)
                    total += int.from_bytes(told[_BYTES_ACKNOWLEDGED:], sys.byteorder)
    return total
