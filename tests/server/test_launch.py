"""The server as a process: start, refuse to start, be asked how it is, and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ntm import Client
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from server.launch import SERVICE_NAMES, Server
from tests import foreign_models, step_models
from tests.conftest import ROOT, ServerProcess
from tests.server.helpers import Caller, accumulated, pending, random_inputs, refused

Start = Callable[..., ServerProcess]


def start_and_fail(*flags: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a server that cannot start; returns the exit status and what it said last."""
    ended = subprocess.run(
        [sys.executable, "-m", "server", *flags],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request).status


def test_a_server_that_listens_is_healthy(start_server: Start, models: Path) -> None:
    address = start_server(models).address

    for service in ["", *SERVICE_NAMES]:
        assert health(address, service) == health_pb2.HealthCheckResponse.SERVING


def test_the_health_command_says_how_the_server_is(start_server: Start, models: Path) -> None:
    server = start_server(models)
    ask = [sys.executable, "-m", "server.rpc.health", server.address]

    serving = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=30)
    server.stop()
    gone = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert (serving.returncode, serving.stdout) == (0, f"{server.address}: SERVING\n")
    assert (gone.returncode, "UNAVAILABLE" in gone.stdout) == (1, True)


def test_clients_without_the_proto_files_can_ask_for_them(start_server: Start, models: Path) -> None:
    with grpc.insecure_channel(start_server(models).address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)

        assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= set(database.get_services())
        file = database.FindFileContainingSymbol("ntm.v1.SessionService")

    assert file.package == "ntm.v1"


def test_it_says_what_it_promises_of_sessions(start_server: Start, models: Path) -> None:
    server = start_server(models)

    assert server.wait_for("sessions are kept in memory only, and end with this process")


def test_sigterm_ends_streams_that_wait_for_their_client(start_server: Start, models: Path) -> None:
    server = start_server(models, "--drain-timeout-s", "20")
    with grpc.insecure_channel(server.address) as channel:
        stub = session_service_pb2_grpc.SessionServiceStub(channel)
        stub.CreateSession(pb.CreateSessionRequest(model_name="accumulator", session_id="s"))

        def messages() -> Iterator[pb.StreamStepsRequest]:
            inputs = to_message(np.ones((1, 3), np.float32))
            yield pb.StreamStepsRequest(step=pb.StepRequest(session_id="s", inputs=inputs))
            answered.wait()

        answered = threading.Event()
        stream = stub.StreamSteps(messages())
        next(stream)
        server.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        answered.set()

        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.wait() == 0
    assert [entry["event"] for entry in server.log][-2:] == ["stopping", "stopped"]


async def test_while_it_stops_it_says_so_lets_nobody_in_and_finishes_what_is_in_progress(
    serve: Callable[..., Awaitable[tuple[Server, str]]], models: Path
) -> None:
    server, address = await serve(models, max_resident_sessions=2)
    caller = Caller(server, address)
    await caller.create("accumulator")
    watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest())
    statuses = aiter(watch)
    assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.SERVING

    with caller.hold("accumulator"):
        step = asyncio.ensure_future(caller.step(random_inputs(3)))
        await pending(caller, "accumulator", 1)
        stopping = asyncio.ensure_future(server.stop())
        assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await refused(caller.step(random_inputs(1)), grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")

    np.testing.assert_array_equal(await step, accumulated(random_inputs(3)))
    await stopping
    await caller.channel.close()


async def test_an_answer_on_its_way_to_a_slow_reader_arrives_while_the_server_stops(
    serve: Callable[..., Awaitable[tuple[Server, str]]], tmp_path: Path
) -> None:
    step_models.write(tmp_path, step_models.accumulator())
    server, address = await serve(tmp_path, max_steps_per_message=100_000, retry_window_steps=100_000)
    host, port = address.split(":")
    stopping: list[asyncio.Future[None]] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_answer: bool) -> None:
        while data := await reader.read(16 * 1024):
            if is_answer and len(data) == 16 * 1024 and not stopping:
                # The answer has begun to arrive, and much of it is still in the server.
                stopping.append(asyncio.ensure_future(server.stop()))
            writer.write(data)
            await writer.drain()
            if is_answer:
                await asyncio.sleep(0.001)  # slow, not waiting for anything
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(
            relay(reader, server_writer, is_answer=False), relay(server_reader, writer, is_answer=True)
        )

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    slow = Caller(server, f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    await slow.create("test")
    inputs = random_inputs(50_000)

    outputs = await slow.step(inputs)

    np.testing.assert_array_equal(outputs, accumulated(inputs))
    assert stopping
    await asyncio.gather(*stopping)
    await slow.channel.close()
    proxy.close()


async def test_what_is_still_running_when_the_drain_is_over_is_cut_off(
    serve: Callable[..., Awaitable[tuple[Server, str]]], models: Path
) -> None:
    server, address = await serve(models, max_resident_sessions=2, drain_timeout_s=0.2)
    caller = Caller(server, address)
    await caller.create("accumulator")

    with caller.hold("accumulator"):
        step = asyncio.ensure_future(caller.step(random_inputs(3)))
        await pending(caller, "accumulator", 1)
        await server.stop()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await step
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    await caller.channel.close()


def test_a_port_in_use_is_refused(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        status, said = start_and_fail("--models", str(models), "--listen", address)

    assert status == 1
    assert f"cannot listen on {address}" in said


def test_a_second_server_does_not_share_the_port_of_the_first(start_server: Start, models: Path) -> None:
    address = start_server(models).address

    status, said = start_and_fail("--models", str(models), "--listen", address)

    assert (status, f"cannot listen on {address}" in said) == (1, True)


def test_a_model_that_cannot_be_served_keeps_the_server_from_starting(tmp_path: Path) -> None:
    path = step_models.write(tmp_path, b"junk")

    status, said = start_and_fail("--models", str(tmp_path), "--listen", "127.0.0.1:0")

    assert status == 1
    assert f"{path} cannot be served" in said


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build has CUDA"
)
def test_device_cuda_without_cuda_keeps_the_server_from_starting(models: Path) -> None:
    status, said = start_and_fail("--models", str(models), "--device", "cuda")

    assert status == 1
    assert "--device cuda cannot be had" in said


@pytest.mark.parametrize(
    ("flags", "environment", "complaint"),
    [
        (["--max-batch-size", "0"], {}, "--max-batch-size"),
        (["--device", "tpu"], {}, "--device"),
        (["--listen", "nowhere"], {}, "must be HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], {}, "must be HOST:PORT"),
        (["--metrics-listen", ":50051"], {}, "must be HOST:PORT"),
        (["--max-steps-per-message", "9999"], {}, "must be at most retry_window_steps"),
        (["--max-sesions", "9"], {}, "--max-sesions"),
        ([], {"NTM_SERVER_MAX_SESIONS": "9"}, "NTM_SERVER_MAX_SESIONS"),
        ([], {"NTM_SERVER_CONFIG": "/nowhere.toml"}, "/nowhere.toml"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    flags: list[str], environment: dict[str, str], complaint: str
) -> None:
    status, said = start_and_fail(*flags, environment=environment)

    assert status == 2
    assert complaint in said


def test_flags_go_before_the_environment_and_that_before_the_file(
    start_server: Start, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "server.toml"
    config.write_text("max_resident_sessions = 10\nmax_batch_size = 11\nmax_pending_messages = 12\n")
    monkeypatch.setenv("NTM_SERVER_CONFIG", str(config))
    monkeypatch.setenv("NTM_SERVER_MAX_BATCH_SIZE", "21")
    monkeypatch.setenv("NTM_SERVER_MAX_PENDING_MESSAGES", "22")

    with Client(start_server(models, "--max-pending-messages", "32").address) as client:
        limits = client.model("accumulator").limits

    assert (limits.max_resident_sessions, limits.max_batch_size, limits.max_pending_messages) == (10, 21, 32)


def test_an_unknown_setting_in_the_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("max_sesions = 10\n")

    status, said = start_and_fail("--config", str(config))

    assert status == 2
    assert "max-sesions" in said


def test_metrics_can_be_scraped(start_server: Start, models: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    server = start_server(models, "--metrics-listen", metrics)
    with Client(server.address) as client, client.session("accumulator") as session:
        session.run(np.ones((5, 3)))

        with urllib.request.urlopen(f"http://{metrics}/metrics") as response:
            lines = response.read().decode().splitlines()

    assert 'ntm_steps_total{model="accumulator/1"} 5.0' in lines
    assert 'ntm_sessions{model="accumulator/1"} 1.0' in lines
    assert 'ntm_calls_total{code="OK",rpc="Step"} 1.0' in lines
    expected = 0.0 if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else 1.0
    assert f"ntm_device_fell_back {expected}" in lines


def test_a_model_that_cannot_be_served_keeps_the_others_from_nothing_where_it_is_to_be_skipped(
    start_server: Start, models: Path
) -> None:
    (models / "accumulator" / "1" / "model.onnx").write_bytes(b"no model")
    step_models.write(models, foreign_models.growing(), "growing")

    status, said = start_and_fail("--models", str(models), "--store", "none")
    server = start_server(
        models, "--model-errors", "skip", "--model-poll-s", "0.05", "--metrics-listen", "127.0.0.1:0"
    )

    assert status == 1
    assert "accumulator/1" in said
    assert health(server.address) == health_pb2.HealthCheckResponse.SERVING
    left_out = {entry["model"] for entry in server.log if "cannot be served" in str(entry["event"])}
    assert left_out == {"accumulator/1", "growing/1"}
    with Client(server.address) as client:
        assert {model.name for model in client.models()}.isdisjoint({"accumulator", "growing"})
        (models / "accumulator" / "1" / "model.onnx").write_bytes(step_models.accumulator())
        while server.wait_for("model loaded")["model"] != "accumulator/1":
            pass
        assert "accumulator" in {model.name for model in client.models()}
