"""Model service: ntm.v1.ModelService, which says what is served and how. No state of its own."""

from __future__ import annotations

from typing import Any

import grpc
import onnxruntime as ort

from ntm.v1 import model_service_pb2, model_service_pb2_grpc
from server.rpc.validation import RequestLimits
from server.sessions.manager import SessionManager
from server.sessions.served_model import ServedModel
from server.storage.interface import Durability

_DURABILITY_LEVELS = {
    Durability.VOLATILE: model_service_pb2.DURABILITY_LEVEL_VOLATILE,
    Durability.PROCESS: model_service_pb2.DURABILITY_LEVEL_PROCESS,
    Durability.POWER: model_service_pb2.DURABILITY_LEVEL_POWER,
}

_Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """ntm.v1.ModelService."""

    def __init__(self, sessions: SessionManager, limits: RequestLimits, transport: str) -> None:
        self._sessions = sessions
        self._limits = limits
        self._transport = transport

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: _Context
    ) -> model_service_pb2.ListModelsResponse:
        served = sorted(self._sessions.models, key=lambda s: (s.model.name, -s.model.version))
        return model_service_pb2.ListModelsResponse(models=[_model_message(s) for s in served])

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: _Context
    ) -> model_service_pb2.GetModelResponse:
        version = request.model_version if request.HasField("model_version") else None
        served = self._sessions.models.find(request.model_name, version)
        device, store = served.runner.device, self._sessions.store.backend
        return model_service_pb2.GetModelResponse(
            model=_model_message(served),
            spec=served.model.spec,
            execution=model_service_pb2.Execution(
                requested_device=device.requested,
                provider=device.provider,
                device_id=device.device_id,
                fell_back_to_cpu=device.fell_back,
                batch_invariant=served.runner.is_batch_invariant,
                padded_batch_size=served.runner.padded_batch_size or 0,
                batching=model_service_pb2.BATCHING_ROW_BY_ROW
                if served.runner.row_by_row
                else model_service_pb2.BATCHING_TOGETHER,
                step_alone_s=served.runner.turn_times_s.get(1, 0),
                step_of_full_batch_s=served.runner.turn_times_s.get(served.runner.max_batch_size, 0),
                onnxruntime_version=ort.__version__,
            ),
            limits=model_service_pb2.Limits(
                max_resident_sessions=served.limits.max_resident_sessions,
                max_batch_size=served.runner.max_batch_size,
                max_steps_per_message=self._limits.max_steps_per_message,
                max_sessions_per_batch=self._limits.max_sessions_per_batch,
                max_message_bytes=self._limits.max_message_bytes,
                max_pending_messages=served.limits.max_pending_messages,
                retry_window_steps=served.limits.retry_window_steps,
                state_bytes_per_session=served.model.state_bytes,
            ),
            durability=model_service_pb2.Durability(
                store=store.kind, level=_DURABILITY_LEVELS[store.durability]
            ),
            transport=self._transport,
        )


def _model_message(served: ServedModel) -> model_service_pb2.ModelVersion:
    model = served.model
    state = (
        model_service_pb2.MODEL_STATE_LEAVING if served.is_draining else model_service_pb2.MODEL_STATE_READY
    )
    return model_service_pb2.ModelVersion(
        name=model.name, version=model.version, digest=model.digest, state=state
    )
