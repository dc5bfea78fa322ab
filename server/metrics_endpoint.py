"""The metrics endpoint: tells Prometheus over HTTP, and over TLS where the server has a certificate.

It lives in the event loop, so a connection that says nothing costs no thread, and ends after a few seconds.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from server.errors import SecurityFileError
from server.security import TlsIdentity

_TIMEOUT_S = 5.0
_PAUSE_S = 0.1
_MAX_CONNECTIONS = 32
_MAX_HEAD_BYTES = 16 * 1024


class MetricsEndpoint:
    """Answers GET /metrics, and GET / as well."""

    def __init__(self, registry: CollectorRegistry, identity: TlsIdentity | None = None) -> None:
        """Nothing listens yet.

        Args:
            registry: what there is to tell.
            identity: the certificate to show; without one it speaks plaintext.
        """
        self._registry = registry
        self._identity = identity
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when it is taken."""
        bare = host.removeprefix("[").removesuffix("]")
        listener = socket.create_server(
            (bare, port), family=socket.AF_INET6 if ":" in bare else socket.AF_INET, reuse_port=False
        )
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(listener))
        bound: int = listener.getsockname()[1]
        return bound

    def stop(self) -> None:
        """Listen no more, and end what is open."""
        for task in (self._accepting, *self._connections):
            if task is not None:
                task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError:  # no descriptors are left, or the client has gone
                    await asyncio.sleep(_PAUSE_S)
                    continue
                if len(self._connections) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                task = asyncio.create_task(self._serve(connection))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            context = None if self._identity is None else self._identity.ssl_context()
        except SecurityFileError:
            connection.close()
            return
        # Whoever scrapes sees what goes wrong, and nobody else is touched.
        with suppress(TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_TIMEOUT_S):
                await self._talk(connection, context)

    async def _talk(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        # The socket is the transport's from here on.
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
        try:
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            writer.write(await self._answer(await reader.readuntil(b"\r\n\r\n")))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        finally:
            transport.abort()

    async def _answer(self, head: bytes) -> bytes:
        request, *fields = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD") or path not in ("/", "/metrics"):
            return _response("404 Not Found", "text/plain; charset=utf-8", b"GET /metrics\n")
        accepted = next((f.partition(":")[2] for f in fields if f.lower().startswith("accept:")), "")
        encode, content_type = choose_encoder(accepted.strip())
        body: bytes = await asyncio.to_thread(encode, self._registry)
        return _response("200 OK", content_type, b"" if method == "HEAD" else body)


def _response(status: str, content_type: str, body: bytes) -> bytes:
    fields = [f"Content-Type: {content_type}", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode() + body
