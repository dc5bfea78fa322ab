"""Triton's metrics, through a real server."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest

from server.launch import Server
from server.rpc.inference import grpc_service_pb2 as pb

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
