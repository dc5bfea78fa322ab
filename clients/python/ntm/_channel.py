"""The channel to a server: plaintext or TLS, and the token that goes with every call."""

from __future__ import annotations

import ipaddress
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

Token = str | Callable[[], str]
"""A bearer token, or what gives one: it is called before each call, and has to be quick."""

Options = Sequence[tuple[str, Any]]

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

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them.

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


def channel(address: str, tls: bool | Tls, token: Token | None, options: Options = OPTIONS) -> grpc.Channel:
    """A synchronous channel; see `Client` for the arguments."""
    interceptors = [_SyncToken(token)] if _is_given(token, tls, address) else []
    settings = _settings(tls)
    plain = (
        grpc.insecure_channel(address, options=options)
        if settings is None
        else grpc.secure_channel(address, settings.credentials, settings.options(options))
    )
    return grpc.intercept_channel(plain, *interceptors) if interceptors else plain


def aio_channel(
    address: str, tls: bool | Tls, token: Token | None, options: Options = OPTIONS
) -> grpc.aio.Channel:
    """An asynchronous channel; see `Client` for the arguments."""
    interceptors: list[Any] = (
        [_AsyncUnaryToken(token), _AsyncStreamToken(token)] if _is_given(token, tls, address) else []
    )
    settings = _settings(tls)
    if settings is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(
        address, settings.credentials, settings.options(options), interceptors=interceptors
    )


def _settings(tls: bool | Tls) -> Tls | None:
    if isinstance(tls, Tls):
        return tls
    return Tls() if tls else None


def _is_given(token: Token | None, tls: bool | Tls, address: str) -> bool:
    """Whether there is a token, which must not travel where others can read it."""
    if token is None:
        return False
    if not tls and not _is_loopback(address):
        raise ValueError(f"a token would go to {address} in plain sight: give tls=True, or tls=Tls(...)")
    return True


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith(("unix:", "unix-abstract:"))


class _TokenHeader:
    """Puts the token into a call's metadata."""

    def __init__(self, token: Token | None) -> None:
        self._token = token

    def _with_token(self, metadata: Any) -> list[tuple[str, Any]]:
        assert self._token is not None
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
