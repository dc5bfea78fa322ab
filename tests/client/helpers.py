"""What stands between a client and a server in these tests: lines that break, and routers that fail by a script."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from ntm import Client
from ntm.v1 import model_service_pb2_grpc, session_service_pb2_grpc

PACKAGE = "ntm.v1"


def intercept(client: Client, interceptor: Any) -> None:
    """Have a client make its calls through an interceptor."""
    call_on(client, grpc.intercept_channel(client._connection.newest.channel, interceptor))


def call_on(client: Client, channel: grpc.Channel) -> None:
    """Have a client make its calls on another channel than its own."""
    connection = client._connection.newest
    connection.sessions = session_service_pb2_grpc.SessionServiceStub(channel)
    connection.models = model_service_pb2_grpc.ModelServiceStub(channel)


class BreakingLine:
    """A TCP proxy that cuts each connection after a random number of bytes, the first `num_cuts` of them."""

    def __init__(self, target: str, seed: int, num_cuts: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._cuts_left = num_cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            host, _, port = self._target.rpartition(":")
            far = socket.create_connection((host, int(port)))
            is_cut = self._cuts_left > 0
            self._cuts_left -= is_cut
            line = _Line(near, far, self._random.randrange(600, 6000) if is_cut else None, self._count_cut)
            # With a reset, bytes under way are lost too.
            line.ends_with_reset = self._random.random() < 0.5

    def _count_cut(self) -> None:
        self.num_cuts += 1


class _Line:
    """One connection, which lives for so many bytes, both directions together."""

    def __init__(
        self, near: socket.socket, far: socket.socket, lifetime: int | None, on_cut: Callable[[], None]
    ) -> None:
        self._sockets = (near, far)
        self._left = lifetime
        self._on_cut = on_cut
        self._lock = threading.Lock()
        self.ends_with_reset = False
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(512):
                if self._left is not None:
                    with self._lock:
                        data, self._left = data[: self._left], self._left - len(data)
                sink.sendall(data)
                if self._left is not None and self._left <= 0:
                    self._cut()
                    return
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other direction was cut
            return

    def _cut(self) -> None:
        with self._lock:
            on_cut, self._on_cut = self._on_cut, lambda: None
        on_cut()
        for end in self._sockets:
            if self.ends_with_reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):  # it has been closed
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Router(grpc.GenericRpcHandler):
    """Passes calls on to a real server, and spoils answers by a script."""

    def __init__(self, target: str) -> None:
        self.faults: dict[str, deque[grpc.StatusCode]] = defaultdict(deque)
        """By rpc, codes of the next calls: they take effect, and then end with this instead of their answer."""
        self.answers_before_fault = 2
        """Of a stream."""
        self.handlers: dict[str, Callable[[bytes, str, grpc.ServicerContext], bytes]] = {}
        """By rpc, what answers in the server's place: request and routing key to answer."""
        self.calls: list[tuple[str, str]] = []
        """Every call's rpc and routing key."""
        self._channel = grpc.insecure_channel(target)
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()

    def count(self, rpc: str) -> int:
        return [name for name, _ in self.calls].count(rpc)

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        rpc = details.method.rpartition("/")[2]
        key = dict(details.invocation_metadata).get("ntm-routing-key", "")
        self.calls.append((rpc, key))

        def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
            if rpc in self.handlers:
                answer = self.handlers[rpc](request, key, context)
            else:
                answer = self.passed_on(details.method, request, context)
            if self.faults[rpc]:
                context.abort(self.faults[rpc].popleft(), "the router gave up")
            return answer

        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            fault = self.faults[rpc].popleft() if self.faults[rpc] else None
            call = self._channel.stream_stream(details.method)(requests)
            context.add_callback(call.cancel)
            try:
                for number, answer in enumerate(call):
                    if fault is not None and number == self.answers_before_fault:
                        context.abort(fault, "the router gave up")
                    yield answer
            except grpc.RpcError as error:
                _abort_alike(error, context)

        if rpc == "StreamSteps":
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    def passed_on(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return self._channel.unary_unary(method)(request)
        except grpc.RpcError as error:
            _abort_alike(error, context)
            raise


def _abort_alike(error: Any, context: grpc.ServicerContext) -> None:
    context.set_trailing_metadata(
        [(key, value) for key, value in error.trailing_metadata() or () if key.endswith("-bin")]
    )
    context.abort(error.code(), error.details())


def abort_with_reason(
    context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, domain: str = PACKAGE
) -> None:
    """End a call as our server does: with an ErrorInfo."""
    status = status_pb2.Status(code=code.value[0], message="as the script says")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain=domain, reason=reason))
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(code, "as the script says")
