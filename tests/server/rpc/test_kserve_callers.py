"""Sequences of the open inference protocol belong to principals, and count for their quotas, as sessions do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from server.rpc.inference import grpc_service_pb2 as pb
from server.security.tokens import line_of
from tests.server.helpers import Start, accumulated, random_inputs

INPUTS = random_inputs(4)


class Infer:
    """Calls ModelInfer with a token."""

    def __init__(self, address: str, token: str) -> None:
        self._call = grpc.aio.insecure_channel(address).unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def __call__(self, row: np.ndarray, sequence_id: int = 0, start: bool = False) -> np.ndarray:
        request = pb.ModelInferRequest(model_name="accumulator")
        request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        request.raw_input_contents.append(row.astype(np.float32).tobytes())
        if sequence_id:
            request.parameters["sequence_id"].int64_param = sequence_id
            request.parameters["sequence_start"].bool_param = start
        answer = await self._call(request, metadata=self._metadata, timeout=30)
        return np.frombuffer(answer.raw_output_contents[0], np.float32)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{line_of('alice', 'a')}\n{line_of('bob', 'b')}")
    return {"tokens": tokens}


async def test_a_sequence_id_is_each_principals_own(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings)
    alice, bob = Infer(address, "a"), Infer(address, "b")

    first = await alice(INPUTS[0], 7, start=True)
    with pytest.raises(grpc.aio.AioRpcError, match="does not live"):
        await bob(INPUTS[0], 7)
    await bob(INPUTS[3], 7, start=True)
    second = await alice(INPUTS[1], 7)

    np.testing.assert_array_equal(np.stack([first, second]), accumulated(INPUTS[:2]))


async def test_a_caller_without_a_token_is_refused(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await Infer(address, "")(INPUTS[0])
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_inferences_count_as_steps_of_the_quota(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings, max_steps_per_s_per_principal=0.01)
    alice, bob = Infer(address, "a"), Infer(address, "b")
    await alice(INPUTS[0])

    with pytest.raises(grpc.aio.AioRpcError, match="quota"):
        await alice(INPUTS[0])
    await bob(INPUTS[0])
