"""The open inference protocol where Triton's own client does not go: elements that do not travel raw."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest

from ntm.tensor import type_name
from ntm.v1 import tensor_pb2
from server.rpc import kserve
from server.rpc.inference import grpc_service_pb2 as pb
from tests import step_models
from tests.server.helpers import Start, random_inputs


async def test_elements_in_the_field_of_their_type_are_those_that_travel_raw(
    serve: Start, models: Path
) -> None:
    _, address = await serve(models)
    values = random_inputs(1)
    raw = pb.ModelInferRequest(model_name="accumulator", raw_input_contents=[values.tobytes()])
    raw.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    typed = pb.ModelInferRequest(model_name="accumulator")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend(
        values[0].tolist()
    )

    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            f"/{kserve.SERVICE_NAME}/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        answers = [await infer(request) for request in (raw, typed)]

    assert answers[0].raw_output_contents == answers[1].raw_output_contents
    np.testing.assert_array_equal(np.frombuffer(answers[0].raw_output_contents[0], np.float32), values[0])


async def test_half_floats_are_taken_raw_and_in_typed_contents_refused_with_where_they_have_to_come(
    serve: Start, tmp_path: Path
) -> None:
    step_models.write(tmp_path, step_models.half_floats(), "halves")
    _, address = await serve(tmp_path)
    values = random_inputs(1).astype(np.float16)
    raw = pb.ModelInferRequest(model_name="halves", raw_input_contents=[values.tobytes()])
    raw.inputs.add(name="x", datatype="FP16", shape=[1, 3])
    typed = pb.ModelInferRequest(model_name="halves")
    typed.inputs.add(name="x", datatype="FP16", shape=[1, 3]).contents.fp32_contents.extend(
        values[0].tolist()
    )

    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            f"/{kserve.SERVICE_NAME}/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        answer = await infer(raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(typed)

    np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), values[0])
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = caught.value.details()
    assert details is not None
    assert "FP16 has no typed contents" in details
    assert "raw_input_contents" in details


@pytest.mark.parametrize("data_type", sorted(set(tensor_pb2.DataType.values()) - {0}))
def test_every_type_has_a_field_for_its_elements_but_half_floats_which_travel_raw(
    data_type: tensor_pb2.DataType.ValueType,
) -> None:
    name = type_name(data_type)

    assert (name in kserve._CONTENTS) == (name != "FP16")
    assert name == "FP16" or kserve._CONTENTS[name] in pb.InferTensorContents.DESCRIPTOR.fields_by_name
