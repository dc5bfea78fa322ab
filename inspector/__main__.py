"""`python -m inspector [HOST:PORT]`: show a running server's sessions, or those of one that is started for it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from inspector.app import application
from inspector.errors import SettingsError
from inspector.settings import InspectorSettings


def main() -> int:
    """Serve the page until told to stop; returns the exit status: 2 for wrong settings, 1 for a start that failed."""
    # So that the server which it has started ends with it; by default SIGTERM ends a process at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = CliApp.run(InspectorSettings, cli_args=sys.argv[1:])
        token = settings.token()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"])).replace("_", "-")
            print(f"{'--' if name else ''}{name}: {problem['msg']}".lstrip(": "), file=sys.stderr)
        return 2
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        listener = _listen(settings)
        with contextlib.nullcontext(settings.address) if settings.address else _server(settings) as address:
            assert address is not None
            app = application(
                functools.partial(settings.connect, address),
                settings.connection_lines(address),
                address,
                token=token,
                host=settings.host,
                is_loopback=settings.is_loopback,
                recording_limit_bytes=settings.recording_limit_mib * 2**20,
            )
            config = uvicorn.Config(
                app,
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
                log_level="warning",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=1,
            )
            print(f"Server on {address}. The page: {_url(settings, listener)}", flush=True)
            asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
    except (OSError, _StartError) as error:
        print(f"the inspector does not start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


class _StartError(Exception):
    """The server that was to be started did not."""


def _listen(settings: InspectorSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    listener.listen(64)
    return listener


def _url(settings: InspectorSettings, listener: socket.socket) -> str:
    scheme = "https" if settings.tls_certificate else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}/"


@contextlib.contextmanager
def _server(settings: InspectorSettings) -> Iterator[str]:
    """A server on the models directory, its sessions in memory: gives its address, and stops it in the end."""
    command = [sys.executable, "-m", "server", "--models", str(settings.models), "--store", "none"]
    command += ["--listen", "127.0.0.1:0", "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)  # nosec B603  # the server
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if '"listening"' in line:
                yield json.loads(line)["address"]
                return
        raise _StartError("".join(said) + "the server on the models directory did not start")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        process.communicate()


if __name__ == "__main__":
    sys.exit(main())
