"""ListModels and GetModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import onnxruntime

from ntm.v1 import model_service_pb2 as pb
from ntm.v1 import model_service_pb2_grpc
from tests import step_models
from tests.server.helpers import GONE, Start, refused


async def test_models_are_listed_by_name_and_newest_version_first(serve: Start, tmp_path: Path) -> None:
    for name, version in (("b", 1), ("a", 2), ("a", 10)):
        step_models.write(tmp_path, step_models.accumulator(), name, version)
    _, address = await serve(tmp_path, max_resident_sessions=2)

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = model_service_pb2_grpc.ModelServiceStub(channel)
        models = (await stub.ListModels(pb.ListModelsRequest())).models
        newest = await stub.GetModel(pb.GetModelRequest(model_name="a"))
        older = await stub.GetModel(pb.GetModelRequest(model_name="a", model_version=2))
        await refused(stub.GetModel(pb.GetModelRequest(model_name="c")), GONE, "MODEL_NOT_FOUND")

    assert [(model.name, model.version) for model in models] == [("a", 10), ("a", 2), ("b", 1)]
    assert (newest.model.version, older.model.version) == (10, 2)


async def test_a_model_says_where_it_runs_and_what_its_limits_and_promises_are(
    serve: Start, models: Path
) -> None:
    _, address = await serve(models, max_resident_sessions=3, max_batch_size=2, retry_window_steps=2000)

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = model_service_pb2_grpc.ModelServiceStub(channel)
        model = await stub.GetModel(pb.GetModelRequest(model_name="many_layouts"))

    assert [state.input_name for state in model.spec.states] == ["memory", "layers", "count"]
    assert model.execution.step_alone_s > 0
    model.execution.ClearField("step_alone_s")
    model.execution.ClearField("step_of_full_batch_s")
    assert model.execution == pb.Execution(
        requested_device="cpu",
        provider="CPUExecutionProvider",
        batch_invariant=True,
        batching=pb.BATCHING_TOGETHER,
        onnxruntime_version=onnxruntime.__version__,
    )
    assert model.limits == pb.Limits(
        max_resident_sessions=3,
        max_batch_size=2,
        max_steps_per_message=1024,
        max_sessions_per_batch=1024,
        max_message_bytes=4 * 1024 * 1024,
        max_pending_messages=4096,
        retry_window_steps=2000,
        state_bytes_per_session=8 * 4 + 6 * 4 + 8,
    )
    assert model.durability == pb.Durability(store="none", level=pb.DURABILITY_LEVEL_VOLATILE)
