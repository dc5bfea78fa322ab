"""The channel to a server: plaintext or TLS, and the token that goes with every call."""

from __future__ import annotations

import ipaddress
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc

from ntm._routing import Address, Options, Target, target

Token = str | Callable[[], str]
"""A bearer token, or what gives one: it is called before each call, and has to be quick."""

# The server keeps its answers below its own limit, so the client sets none.
# gRPC waits before it connects again, by default up to two minutes; the client's own pauses are enough.
OPTIONS: Options = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]

_AUTHORIZATION_KEY = "authorization"


@dataclass(frozen=True)
class Tls:
    """How to tell the server, and how to be told by it; paths of files in PEM."""

    authorities: str | Path | None = None
    """Authorities that the server's certificate must come from. None: those that come with gRPC."""
    certificate: str | Path | None = None
    """This client's certificate, for a server that asks for one, and its key."""
    key: str | Path | None = None
    server_name: str | None = None
    """The name that the server's certificate must have. None: the host of the address."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or neither")

    @cached_property
    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them; always the same, so that channels can share connections.

        Raises:
            OSError: a file cannot be read.
        """
        read = [
            None if path is None else Path(path).read_bytes()
            for path in (self.authorities, self.key, self.certificate)
        ]
        return grpc.ssl_channel_credentials(*read)

    def options(self, options: Options) -> Options:
        """Channel options with those that this needs."""
        if self.server_name is None:
            return options
        return [*options, ("grpc.ssl_target_name_override", self.server_name)]


def channel(
    address: Address | Target, tls: bool | Tls, token: Token | None, options: Options = OPTIONS
) -> grpc.Channel:
    """A synchronous channel; see `Client` for the arguments."""
    where, settings, options = _checked(address, tls, token, options)
    plain = (
        grpc.insecure_channel(where.name, options=options)
        if settings is None
        else grpc.secure_channel(where.name, settings.credentials, options)
    )
    return plain if token is None else grpc.intercept_channel(plain, _SyncToken(token))


def aio_channel(
    address: Address | Target, tls: bool | Tls, token: Token | None, options: Options = OPTIONS
) -> grpc.aio.Channel:
    """An asynchronous channel; see `Client` for the arguments."""
    where, settings, options = _checked(address, tls, token, options)
    interceptors: list[Any] = [] if token is None else [_AsyncUnaryToken(token), _AsyncStreamToken(token)]
    if settings is None:
        return grpc.aio.insecure_channel(where.name, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(
        where.name, settings.credentials, options=options, interceptors=interceptors
    )


def tls_settings(tls: bool | Tls) -> Tls | None:
    """How to encrypt; None: not."""
    if isinstance(tls, Tls):
        return tls
    return Tls() if tls else None


def _checked(
    address: Address | Target, tls: bool | Tls, token: Token | None, options: Options
) -> tuple[Target, Tls | None, Options]:
    """What a channel is made of, if it may be made."""
    where = address if isinstance(address, Target) else target(address)
    settings = tls_settings(tls)
    if settings is None:
        if token is not None and not all(map(_is_loopback, where.hosts)):
            told = ", ".join(where.hosts)
            raise ValueError(f"a token would go to {told} in plain sight: give tls=True, or tls=Tls(...)")
        return where, None, [*options, *where.options, *where.authority]
    if where.is_routed and not where.is_looked_up and settings.server_name is None:
        raise ValueError(
            "the servers of a list have no common name: give the one in their certificates, "
            "as tls=Tls(server_name=...)"
        )
    return where, settings, settings.options([*options, *where.options])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _TokenHeader:
    """Puts the token into a call's metadata."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def _with_token(self, metadata: Any) -> list[tuple[str, Any]]:
        token = self._token if isinstance(self._token, str) else self._token()
        return [*(metadata or ()), (_AUTHORIZATION_KEY, f"Bearer {token}")]


_SyncDetails = namedtuple(
    "_SyncDetails", ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression")
)


class _SyncToken(_TokenHeader, grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._details(client_call_details), request)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(self._details(client_call_details), request_iterator)

    def _details(self, details: Any) -> Any:
        fields = {name: getattr(details, name, None) for name in _SyncDetails._fields}
        return _SyncDetails(**fields | {"metadata": self._with_token(details.metadata)})


class _AsyncUnaryToken(_TokenHeader, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_async_details(self, client_call_details), request)


class _AsyncStreamToken(_TokenHeader, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(_async_details(self, client_call_details), request_iterator)


def _async_details(header: _TokenHeader, details: Any) -> Any:
    return details._replace(metadata=grpc.aio.Metadata(*header._with_token(details.metadata)))
