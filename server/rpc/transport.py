"""Transport: what carries HTTP/2 and gRPC framing, chosen once at start.

Two carry the same services, by the interface of `grpc.aio.Server`. `native` (the package pygrpc-native) does its work
outside the interpreter's lock and hands plain calls over in batches; it has no TLS, and gives bidirectional streams to
a grpcio server behind it. `grpcio` has everything. `launch.py` adds the services and starts it.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from typing import Any, Literal, cast

import grpc

from server.errors import TransportError
from server.rpc.interceptors import CallInterceptor
from server.rpc.native import NativeServer

_HANDSHAKE_TIMEOUT_MS = 10_000
MAX_CONCURRENT_STREAMS = 1024
"""Calls of one connection at a time; clients wait by themselves where they have more."""

Kind = Literal["native", "grpcio"]


@dataclass(frozen=True)
class Choice:
    """Which transport serves, and why."""

    kind: Kind
    reason: str
    """A phrase for the log."""


def choose(requested: Literal["auto", "native", "grpcio"], needs_tls: bool = False) -> Choice:
    """The transport that a setting names; `auto` takes the native one where it can serve what is asked.

    Raises:
        TransportError: the native transport was asked for, and cannot serve what is asked.
    """
    problem = "it has no TLS" if needs_tls else _why_no_socket()
    if requested == "native" and problem:
        raise TransportError(
            f"--transport native cannot be had: {problem}; use --transport auto or grpcio, or take the reason away"
        )
    if requested != "auto":
        return Choice(requested, "as asked")
    if problem:
        return Choice("grpcio", f"not the native transport: {problem}")
    return Choice("native", "it can serve what is asked")


def _why_no_socket() -> str:
    """Why the native transport cannot reach the grpcio server behind it, or ""."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return "there is no directory for temporary files, where its Unix socket would be"
    return ""


def make_server(
    kind: Kind, interceptor: CallInterceptor | None, max_message_bytes: int, max_wait_s: float = math.inf
) -> grpc.aio.Server:
    """A server that serves nothing yet and listens nowhere.

    Args:
        kind: what carries the calls.
        interceptor: runs around every call; the native transport needs one.
        max_message_bytes: of one answer at most. Twice as large a request is taken, so that one somewhat too large is
            told which field is at fault.
        max_wait_s: seconds that calls may wait for the event loop, where the transport knows of it.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", 2 * max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Without it a second server could share the port and take half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
    ]
    if kind == "grpcio":
        # Without a bound whoever begins calls and resets them at once takes the connections of all others with it.
        options.append(("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS))
    server = grpc.aio.server(interceptors=[interceptor] if interceptor else [], options=options)
    if kind == "grpcio":
        return server
    assert interceptor is not None
    # It has what a server is asked for here, under the same names.
    return cast(
        grpc.aio.Server,
        NativeServer(
            interceptor, server, 2 * max_message_bytes, max_message_bytes, max_wait_s, MAX_CONCURRENT_STREAMS
        ),
    )
