"""What the metrics tell, through a real server: Triton's by their names, and our own."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest

from ntm import AsyncClient, UnauthenticatedError
from server.launch import Server
from server.metrics import MOST_PRINCIPALS, Metrics
from server.rpc.inference import grpc_service_pb2 as pb
from server.security.tokens import line_of

Start = Callable[..., Awaitable[tuple[Server, str]]]


async def infer(address: str, width: int, num_steps: int, model: str = "accumulator") -> None:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, num_steps, width])
    request.raw_input_contents.append(np.full((num_steps, width), 9, np.float32).tobytes())
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        await call(request, timeout=30)


def told(server: Server) -> dict[str, float]:
    """Triton's samples, by name and labels as Prometheus reads them."""
    text = generate_latest(server.metrics.registry).decode()
    return {name: float(value) for name, value in re.findall(r"^(nv_\S+) (\S+)$", text, re.MULTILINE)}


async def test_requests_steps_and_batches_are_told_by_tritons_names(serve: Start, models: Path) -> None:
    server, address = await serve(models, triton_metrics=True)
    accumulator = 'model="accumulator",version="1"'

    await infer(address, 3, 4)
    await infer(address, 3, 1)
    for model, width in (("accumulator", 2), ("fragile", 3)):
        with pytest.raises(grpc.aio.AioRpcError):
            await infer(address, width, 1, model)

    samples = told(server)
    assert samples[f"nv_inference_request_success{{{accumulator}}}"] == 2
    assert samples['nv_inference_request_failure{model="accumulator",reason="OTHER",version="1"}'] == 1
    assert samples['nv_inference_request_failure{model="fragile",reason="BACKEND",version="1"}'] == 1
    assert samples[f"nv_inference_count{{{accumulator}}}"] == 5
    assert samples[f"nv_inference_exec_count{{{accumulator}}}"] == 5
    assert samples[f"nv_inference_request_duration_us{{{accumulator}}}"] > 0
    assert samples[f"nv_inference_queue_duration_us{{{accumulator}}}"] >= 0


async def test_they_are_told_only_where_they_are_asked_for(serve: Start, models: Path) -> None:
    server, address = await serve(models)

    await infer(address, 3, 1)

    assert not told(server)


def samples(server: Server) -> dict[tuple[str, ...], float]:
    """What the registry tells, by name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in server.metrics.registry.collect()
        for sample in metric.samples
    }


async def test_queue_and_run_and_each_operation_of_the_store_are_told_apart(
    serve: Start, models: Path, tmp_path: Path
) -> None:
    server, address = await serve(models, store=f"sqlite:///{tmp_path}/s.sqlite3")

    async with AsyncClient(address) as client:
        session = await client.session("accumulator", session_id="s")
        await session.run(np.ones((3, 3), np.float32))
        [_ async for _ in client.sessions()]

    told = samples(server)
    assert told["ntm_queue_seconds_count", "accumulator/1"] == 1
    assert told["ntm_run_seconds_count", "accumulator/1"] == 3
    assert told["ntm_store_commit_seconds_count",] == 2
    assert told["ntm_store_read_seconds_count", "page"] == 1


async def test_every_supervised_thread_is_told_alive_and_a_dead_one_is_not(
    serve: Start, models: Path, tmp_path: Path
) -> None:
    server, _ = await serve(models, store=f"sqlite:///{tmp_path}/s.sqlite3", transport="native")
    ended = threading.Thread(target=lambda: None, name="of a test")
    ended.start()
    ended.join()

    server.metrics.watch_thread(ended)

    told = {key[1]: value for key, value in samples(server).items() if key[0] == "ntm_thread_alive"}
    engines = {f"engine {served.model.label}" for served in server.sessions.models}
    assert {name for name, value in told.items() if value} == {
        *engines,
        "store writer",
        "store heartbeat",
        "gRPC calls",
    }
    assert told["of a test"] == 0


async def test_a_model_that_is_gone_takes_its_thread_along(serve: Start, models: Path) -> None:
    server, _ = await serve(models)

    server.metrics.forget("accumulator/1")

    assert ("ntm_thread_alive", "engine accumulator/1") not in samples(server)


async def test_calls_and_steps_are_counted_by_principal_and_never_by_token(
    serve: Start, models: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(line_of(name, f"{name}-token") for name in ("alice", "bob")))
    server, address = await serve(models, tokens=tokens)

    for name, num_steps in (("alice", 3), ("bob", 5)):
        async with AsyncClient(address, token=f"{name}-token") as client:
            session = await client.session("accumulator")
            await session.run(np.ones((num_steps, 3), np.float32))
    await infer_as(address, "alice-token", 2)
    with pytest.raises(UnauthenticatedError):
        async with AsyncClient(address, token="nobodys-token") as client:
            await client.models()

    told = samples(server)
    assert told["ntm_principal_steps_total", "alice"] == 5
    assert told["ntm_principal_steps_total", "bob"] == 5
    assert told["ntm_principal_calls_total", "bob"] == 3  # creates, asks for the model, steps
    assert told["ntm_refusals_total", "UNAUTHENTICATED"] == 1
    assert "-token" not in generate_latest(server.metrics.registry).decode()


async def infer_as(address: str, token: str, num_steps: int) -> None:
    request = pb.ModelInferRequest(model_name="accumulator")
    request.inputs.add(name="x", datatype="FP32", shape=[1, num_steps, 3])
    request.raw_input_contents.append(np.ones((num_steps, 3), np.float32).tobytes())
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        await call(request, timeout=30, metadata=[("authorization", f"Bearer {token}")])


def test_more_principals_than_have_labels_are_counted_together() -> None:
    metrics = Metrics()

    for number in range(MOST_PRINCIPALS + 5):
        metrics.count_principal_call(f"p{number}")
    metrics.count_principal_call("p0")

    text = generate_latest(metrics.registry).decode()
    assert 'ntm_principal_calls_total{principal="p0"} 2.0' in text
    assert 'ntm_principal_calls_total{principal="other"} 5.0' in text
    assert text.count("ntm_principal_calls_total{") == MOST_PRINCIPALS + 1
