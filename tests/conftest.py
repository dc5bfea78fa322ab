"""What tests of more than one package share: servers, real ones, on free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
import uvloop

from server.launch import Server, build
from server.settings import ServerSettings
from tests import step_models
from tests.valkey import ValkeyServer

ROOT = Path(__file__).parent.parent


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """Tests run on the loop that the server runs on."""
    return {"uvloop": uvloop.new_event_loop}


class ServerProcess:
    """`python -m server` in a process of its own, listening."""

    def __init__(self, models: Path, *flags: str, listen: str = "127.0.0.1:0", store: str = "none") -> None:
        command = [sys.executable, "-m", "server", "--models", str(models), "--listen", listen]
        command += ["--store", store]
        self._process = subprocess.Popen(
            [*command, "--log-format", "json", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.log: list[dict[str, object]] = []
        self.address = str(self.wait_for("listening")["address"])

    def wait_for(self, event: str) -> dict[str, object]:
        """Read the log up to an event."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(self._parsed(line))
            if self.log[-1]["event"] == event:
                return self.log[-1]
        raise AssertionError(f"the server ended before it said {event!r}: {self.log}")

    def forget_the_log(self) -> None:
        """Read the log without keeping it, from a thread, so that the server is never held up by it."""
        assert self._process.stderr is not None
        threading.Thread(target=deque, args=(self._process.stderr, 0), daemon=True).start()

    def _parsed(self, line: str) -> dict[str, object]:
        try:
            return dict(json.loads(line))
        except ValueError:
            assert self._process.stderr is not None
            raise AssertionError(f"not a line of the log: {line}{self._process.stderr.read()}") from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Read the log to its end; returns the exit status."""
        assert self._process.stderr is not None
        self.log += [self._parsed(line) for line in self._process.stderr]
        return self._process.wait(timeout=30)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self.wait()


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A test that sets up the log, as a command does, leaves it to the others as it was."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Start server processes, and stop them after the test."""
    started: list[ServerProcess] = []

    def start(models: Path, *flags: str, **options: str) -> ServerProcess:
        started.append(ServerProcess(models, *flags, **options))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture(scope="session")
def valkey_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def valkey(valkey_process: ValkeyServer) -> ValkeyServer:
    """A running server with nothing in it; tests that stop it, or change its settings, start their own."""
    with valkey_process.client() as client:
        client.flushall()
    return valkey_process


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models directory with every small step model, each under its function's name."""
    root = tmp_path / "models"
    for make in (
        step_models.accumulator,
        step_models.delay_line,
        step_models.fragile,
        step_models.logarithm,
        step_models.many_layouts,
    ):
        step_models.write(root, make(), make.__name__)
    return root


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Callable[..., object]]:
    """Start servers in this process, listening on real ports; returns (server, address)."""
    started: list[Server] = []

    async def start(models: Path, **settings: object) -> tuple[Server, str]:
        settings = {"store": "none", "listen": "127.0.0.1:0", "device": "cpu", **settings}
        server = await build(ServerSettings(models=models, **settings))  # type: ignore[arg-type]
        port = await server.start()
        started.append(server)
        return server, f"127.0.0.1:{port}"

    yield start
    for server in started:
        await server.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need CUDA; elsewhere they are skipped with the reason shown."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidia0").exists():
        return
    skip = pytest.mark.skip(reason="no CUDA device, or ONNX Runtime without CUDA")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
