"""KServe: `inference.GRPCInferenceService`, as Triton's clients speak it, over the same sessions.

A sequence is a session of the caller's. START makes one, in the place of one that lives; END deletes it after the
request's steps; one without END ends by an idle limit. A request of T steps has inputs [1, T, ...shape]; without T,
[1, ...shape], one. The request parameter `first_step` makes a repeat safe, as in `ntm.v1`. With START a state may be
given as an input; the input `reset` says which steps begin from the state that the sequence began from. Without a
sequence id a request runs from the initial state and leaves nothing behind.

Shapes: T steps of a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, time
from typing import Any

import grpc
import numpy as np

from ntm.tensor import Array, data_type, numpy_dtype, type_name
from ntm.v1 import tensor_pb2
from server.errors import (
    EngineFailedError,
    InvalidInputError,
    ModelNotFoundError,
    NoFreeSlotError,
    QueueFullError,
    QuotaExceededError,
    SessionNotFoundError,
    StepFailedError,
    StepTimedOutError,
)
from server.metrics import Metrics, Reason
from server.model.layout import Steps
from server.model.spec import StepModel, api_shape, initial_state, to_api
from server.rpc.access import Access
from server.rpc.failures import MOST_CHARACTERS_LOGGED, Failures
from server.rpc.inference import grpc_service_pb2 as pb
from server.rpc.streaming import IdleStreams
from server.rpc.validation import RequestLimits
from server.security import split_key
from server.sessions.manager import SessionManager
from server.sessions.request import StepResult
from server.sessions.served_model import ServedModel

PROBES = [f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")]
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_PREFIX = "sequence~"
_RESET = "reset"
"""The input that says which steps begin from the initial state, unless the model has one of this name."""
_MOST_CONCURRENT = 256
"""Requests of one stream that may be at work."""

_CONTENTS = {  # half floats have no field
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What a request says of its sequence."""

    sequence_id: str
    """"" for none; an integer and a string never collide."""
    starts: bool
    ends: bool
    first_step: int | None


@dataclass(frozen=True, slots=True)
class _Given:
    """What a request's inputs are."""

    steps: Steps
    """[T]."""
    has_steps_axis: bool
    states: dict[str, Array]
    """By name, in the API's axes: what the sequence begins from instead of the model's own values."""


@dataclass(slots=True)
class _Statistics:
    """What was inferred with one version of a model."""

    num_ok: int = 0
    ok_s: float = 0.0
    num_failed: int = 0
    failed_s: float = 0.0
    num_steps: int = 0
    last_time_s: float = 0.0


class InferenceService:
    """inference.GRPCInferenceService."""

    def __init__(
        self,
        sessions: SessionManager,
        limits: RequestLimits,
        access: Access,
        version: str,
        sequence_idle_s: float,
        idle_streams: IdleStreams,
        metrics: Metrics,
        failures: Failures,
    ) -> None:
        """Nothing is inferred yet.

        Args:
            sessions: all there are.
            limits: what a request may ask for.
            access: what its caller may reach.
            version: the server's, as metadata tells it.
            sequence_idle_s: seconds without a request after which a sequence ends.
            idle_streams: those that wait for their client.
            metrics: where requests are counted.
            failures: tells of those that fail.
        """
        self._sessions = sessions
        self._limits = limits
        self._access = access
        self._version = version
        self._sequence_idle_s = sequence_idle_s
        self._idle_streams = idle_streams
        self._metrics = metrics
        self._failures = failures
        self._session_ids: dict[str, str] = {}
        """Of the sequences that this server has seen, by the beginning of their keys."""
        self._statistics: dict[tuple[str, int], _Statistics] = defaultdict(_Statistics)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        methods = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
        handlers = {}
        for method in methods:
            request: Any = getattr(pb, method.input_type.name)
            answer: Any = getattr(pb, method.output_type.name)
            make = (
                grpc.stream_stream_rpc_method_handler
                if method.client_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            handlers[method.name] = make(
                getattr(self, method.name),
                request_deserializer=request.FromString,
                response_serializer=answer.SerializeToString,
            )
        generic = grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)
        server.add_generic_rpc_handlers((generic,))
        server.add_registered_method_handlers(SERVICE_NAME, handlers)

    # What there is.

    async def ServerLive(self, request: pb.ServerLiveRequest, context: _Context) -> pb.ServerLiveResponse:
        """It answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: _Context) -> pb.ServerReadyResponse:
        """A server that listens can serve."""
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: _Context) -> pb.ModelReadyResponse:
        """Whether a version is in service."""
        try:
            self._model(request.name, request.version)
        except ModelNotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: _Context
    ) -> pb.ServerMetadataResponse:
        """Name, version and extensions."""
        extensions = ["sequence", "model_repository", "model_configuration", "statistics"]
        return pb.ServerMetadataResponse(name="ntm", version=self._version, extensions=extensions)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: _Context
    ) -> pb.ModelMetadataResponse:
        """What a model takes and gives: one step, with the batch axis first."""
        served = self._model(request.name, request.version)
        model = served.model
        answer = pb.ModelMetadataResponse(name=model.name, versions=[str(model.version)], platform="onnx")
        for tensors, target in (
            (model.input_tensors, answer.inputs),
            (model.output_tensors, answer.outputs),
        ):
            for tensor in tensors:
                target.add(name=tensor.name, datatype=type_name(tensor.dtype), shape=[-1, *tensor.shape])
        return answer

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: _Context) -> pb.ModelConfigResponse:
        """How it is served: as sequences, run together."""
        served = self._model(request.name, request.version)
        model, answer = served.model, pb.ModelConfigResponse()
        config = answer.config
        config.name, config.platform, config.backend = model.name, "onnxruntime_onnx", "ntm"
        config.max_batch_size = served.runner.max_batch_size
        for tensor in model.input_tensors:
            config.input.add(name=tensor.name, data_type=_config_type(tensor.dtype), dims=tensor.shape)
        for tensor in model.output_tensors:
            config.output.add(name=tensor.name, data_type=_config_type(tensor.dtype), dims=tensor.shape)
        batching = config.sequence_batching
        batching.max_sequence_idle_microseconds = round(self._sequence_idle_s * 1e6)
        batching.oldest.max_candidate_sequences = served.limits.max_resident_sessions
        for state in model.spec.states:
            batching.state.add(
                input_name=state.input_name,
                output_name=state.output_name,
                data_type=_config_type(state.dtype),
                dims=state.shape,
            )
        return answer

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: _Context
    ) -> pb.ModelStatisticsResponse:
        """What was inferred through this service since the start."""
        answer = pb.ModelStatisticsResponse()
        for (name, version), seen in sorted(self._statistics.items()):
            if request.name in ("", name) and request.version in ("", str(version)):
                stats = answer.model_stats.add(
                    name=name,
                    version=str(version),
                    last_inference=round(seen.last_time_s * 1e3),
                    inference_count=seen.num_steps,
                    execution_count=seen.num_ok,
                )
                stats.inference_stats.success.count = seen.num_ok
                stats.inference_stats.success.ns = round(seen.ok_s * 1e9)
                stats.inference_stats.fail.count = seen.num_failed
                stats.inference_stats.fail.ns = round(seen.failed_s * 1e9)
        return answer

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: _Context
    ) -> pb.RepositoryIndexResponse:
        """The versions in service."""
        answer = pb.RepositoryIndexResponse()
        for served in sorted(self._sessions.models, key=lambda s: (s.model.name, s.model.version)):
            answer.models.add(
                name=served.model.name, version=str(served.model.version), state="READY", reason=""
            )
        return answer

    # Inference.

    async def ModelInfer(self, request: pb.ModelInferRequest, context: _Context) -> pb.ModelInferResponse:
        """Steps of a sequence, or one from the initial state."""
        return await self._infer(request)

    async def ModelStreamInfer(
        self, _requests: AsyncIterator[pb.ModelInferRequest], context: _Context
    ) -> None:
        """Requests of a stream: those of one sequence in order, those of several at once."""
        metadata = context.invocation_metadata() or ()
        last_of: dict[str, asyncio.Task[None]] = {}
        at_work: set[asyncio.Task[None]] = set()
        writing = asyncio.Lock()

        async def handle(request: pb.ModelInferRequest, after: asyncio.Task[None] | None) -> None:
            if after is not None:
                await asyncio.wait([after])
            answer = pb.ModelStreamInferResponse()
            try:
                answer.infer_response.CopyFrom(await self._infer(request))
            except Exception as error:
                told = self._failures.tell(
                    "ModelStreamInfer", error, metadata, inference_id=request.id[:MOST_CHARACTERS_LOGGED]
                )
                answer.error_message = told.message
                answer.infer_response.id = request.id
            async with writing:
                await context.write(answer)

        own_task = asyncio.current_task()
        assert own_task is not None
        try:
            while (request := await self._idle_streams.read(context, own_task)) is not None:
                key = f"{request.model_name}/{_parameter(request.parameters, 'sequence_id')}"
                task = asyncio.create_task(handle(request, last_of.get(key)))
                last_of[key] = task
                at_work.add(task)
                task.add_done_callback(at_work.discard)
                if len(at_work) >= _MOST_CONCURRENT:
                    await asyncio.wait(at_work, return_when=asyncio.FIRST_COMPLETED)
                    last_of = {key: task for key, task in last_of.items() if not task.done()}
            if at_work:
                await asyncio.wait(at_work)
        finally:
            for task in at_work:
                task.cancel()

    async def _infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        served = self._model(request.model_name, request.model_version)
        seen, start_s = self._statistics[served.model.name, served.model.version], perf_counter()
        try:
            answer = await self._run(served, request)
        except BaseException as error:
            taken_s = perf_counter() - start_s
            seen.num_failed += 1
            seen.failed_s += taken_s
            self._metrics.count_inference(served.model.label, taken_s, _reason(error))
            raise
        taken_s = perf_counter() - start_s
        seen.num_ok += 1
        seen.ok_s += taken_s
        self._metrics.count_inference(served.model.label, taken_s, None)
        seen.last_time_s = time()
        return answer

    async def _run(self, served: ServedModel, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        model, sequence = served.model, _sequence_of(request)
        given = _inputs_of(request, model, self._limits)
        if given.states and not (sequence.sequence_id and sequence.starts):
            raise InvalidInputError(
                f"inputs.{min(given.states)}",
                "a state is given where a sequence begins: set sequence_id and sequence_start, or leave it out",
            )
        steps = given.steps
        output_names, state_names = _wanted(request, model)
        self._statistics[model.name, model.version].num_steps += len(steps)
        with self._access.steps(served, len(steps)):
            if not sequence.sequence_id:
                result = await self._run_alone(served, steps)
            else:
                result = await self._run_sequence(served, sequence, given, bool(state_names))
        answer = pb.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=request.id)
        answer.parameters["next_step"].int64_param = result.next_step
        for name in ("sequence_id", "sequence_start", "sequence_end"):
            if name in request.parameters:
                answer.parameters[name].CopyFrom(request.parameters[name])
        for name in output_names:
            values = model.outputs.tensor(result.outputs, name)
            _add_output(answer, name, values[None] if given.has_steps_axis else values)
        states = {state.input_name: state for state in model.spec.states}
        for name in state_names:
            _add_output(answer, name, to_api(states[name], result.state[name])[None])
        return answer

    async def _run_alone(self, served: ServedModel, steps: Steps) -> StepResult:
        """Steps from the initial state, of nobody's session."""
        initial_state(served.model.spec, {})  # a session input without a value of its own needs a sequence
        return await self._sessions.step_alone(served, steps)

    async def _run_sequence(
        self, served: ServedModel, sequence: _Sequence, given: _Given, wants_state: bool
    ) -> StepResult:
        beginning = self._beginning_of(served.model.name, sequence.sequence_id)
        key = await self._find(served, beginning)
        if sequence.starts and (key is None or sequence.first_step is None):
            initial_state(served.model.spec, given.states)  # refused before anything gives way
            if key is not None:  # Triton's meaning: what was left without END gives way
                await self._sessions.delete(key, allow_missing=True)
            new = beginning + secrets.token_hex(4)
            info = await self._access.begin(
                lambda: self._sessions.create(served.model.name, served.model.version, new, "", given.states),
                served.model.name,
                "",
            )
            key = self._session_ids[beginning] = info.session_id
            self._access.audit("session created", key)
        elif key is None:
            raise InvalidInputError(
                "parameters.sequence_start",
                f"sequence {sequence.sequence_id[1:]!r} of model {served.model.name!r} does not live: set "
                "sequence_start in its first request (it has ended, or was idle too long, if it ever began)",
            )
        try:
            session = await self._sessions.find(key)
            result = await self._sessions.step(session, given.steps, sequence.first_step, wants_state)
        except SessionNotFoundError:
            self._session_ids.pop(beginning, None)
            raise
        if sequence.ends:
            self._session_ids.pop(beginning, None)
            await self._sessions.delete(key, allow_missing=True)
            self._access.audit("session deleted", key)
        return result

    def _beginning_of(self, model_name: str, sequence_id: str) -> str:
        """What the keys of the sessions begin with that are a sequence of the caller's, one after another."""
        digest = hashlib.sha256(f"{model_name}/{sequence_id}".encode()).hexdigest()[:24]
        return self._access.namespace("").key(f"{_PREFIX}{digest}~")

    async def _find(self, served: ServedModel, beginning: str) -> str | None:
        """The key of a sequence that lives, here or in the store."""
        key = self._session_ids.get(beginning)
        if key is not None and key in self._sessions.in_memory:
            return key
        page, _ = await self._sessions.page(beginning, 1, served.model.name)
        if page and page[0].session_id.startswith(beginning):
            self._session_ids[beginning] = page[0].session_id
            return page[0].session_id
        self._session_ids.pop(beginning, None)
        return None

    async def end_idle(self) -> None:
        """End the sequences that no request has used for their idle limit.

        Raises:
            StoreError, LeaseLapsedError.
        """
        await self._sessions.end_idle(self._sequence_idle_s, _is_sequence)
        self._session_ids = {
            beginning: key for beginning, key in self._session_ids.items() if key in self._sessions.in_memory
        }

    def _model(self, name: str, version: str) -> ServedModel:
        if version and not version.isdecimal():
            raise InvalidInputError("model_version", f"{version!r} is no number: send one, or nothing")
        return self._sessions.models.find(name, int(version) if version else None)


def _reason(error: BaseException) -> Reason:
    """Why a request failed, in Triton's words."""
    match error:
        case asyncio.CancelledError():
            return "CANCELED"
        case QueueFullError() | NoFreeSlotError() | QuotaExceededError():
            return "REJECTED"
        case StepFailedError() | StepTimedOutError() | EngineFailedError():
            return "BACKEND"
    return "OTHER"


def _is_sequence(key: str) -> bool:
    return split_key(key)[1].startswith(_PREFIX)


def _parameter(parameters: Mapping[str, pb.InferParameter], name: str) -> bool | int | str | None:
    if name not in parameters:
        return None
    parameter = parameters[name]
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)


def _sequence_of(request: pb.ModelInferRequest) -> _Sequence:
    """What a request says of its sequence; parameters of other names are for others."""
    given = _parameter(request.parameters, "sequence_id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | str)):
        raise InvalidInputError("parameters.sequence_id", "it is an integer or a string")
    if isinstance(given, str) and len(given) > 128:
        raise InvalidInputError("parameters.sequence_id", "it has more than 128 characters")
    sequence_id = "" if given in (None, 0, "") else f"{'s' if isinstance(given, str) else 'i'}{given}"
    flags = {}
    for name in ("sequence_start", "sequence_end"):
        flag = _parameter(request.parameters, name)
        if flag is not None and not isinstance(flag, bool):
            raise InvalidInputError(f"parameters.{name}", "it is a boolean")
        flags[name] = bool(flag)
    first_step = _parameter(request.parameters, "first_step")
    if first_step is not None and (
        isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0
    ):
        raise InvalidInputError("parameters.first_step", "it is an integer, 0 or more")
    if not sequence_id and (flags["sequence_start"] or flags["sequence_end"] or first_step is not None):
        raise InvalidInputError(
            "parameters.sequence_id",
            "sequence_start, sequence_end and first_step need one, not 0 and not empty",
        )
    return _Sequence(
        sequence_id,
        flags["sequence_start"],
        flags["sequence_end"],
        first_step if isinstance(first_step, int) else None,
    )


def _inputs_of(request: pb.ModelInferRequest, model: StepModel, limits: RequestLimits) -> _Given:
    """The steps of a request, which of them begin anew, and the states it gives."""
    given = {tensor.name: (tensor, position) for position, tensor in enumerate(request.inputs)}
    wanted = {tensor.name: tensor for tensor in model.input_tensors}
    states = {state.input_name: state for state in model.spec.states}
    optional = {*states, _RESET} - {*wanted}
    if not {*wanted} <= {*given} <= {*wanted, *optional} or len(given) != len(request.inputs):
        raise InvalidInputError(
            "inputs",
            f"they are {sorted(given)}, the model takes {sorted(wanted)}, and may be given {sorted(optional)}, "
            "each once",
        )
    num_raw = len(request.raw_input_contents)
    if num_raw not in (0, len(request.inputs)):
        raise InvalidInputError(
            "raw_input_contents", f"{num_raw} for {len(request.inputs)} inputs: send one for each, or none"
        )

    def array(name: str, data_type: tensor_pb2.DataType.ValueType, shape: Sequence[int]) -> Array:
        tensor, position = given[name]
        raw = request.raw_input_contents[position] if num_raw else None
        return _array(tensor, data_type, tuple(shape), raw)

    arrays = {name: array(name, spec.dtype, spec.shape) for name, spec in wanted.items()}
    ranks = {array.ndim - len(wanted[name].shape) for name, array in arrays.items()}
    if len(ranks) > 1:
        raise InvalidInputError("inputs", "some have an axis for steps and some have none: give all the same")
    (rank,) = ranks
    has_steps_axis = rank == 2
    steps_of = {name: (array[0] if has_steps_axis else array) for name, array in arrays.items()}
    lengths = {len(array) for array in steps_of.values()}
    if len(lengths) > 1:
        raise InvalidInputError("inputs", f"they have {sorted(lengths)} steps: give all as many")
    (num_steps,) = lengths
    if not 1 <= num_steps <= limits.max_steps_per_message:
        raise InvalidInputError(
            "inputs", f"{num_steps} steps in one request: send 1 to {limits.max_steps_per_message}"
        )
    resets = None
    if _RESET in given and _RESET not in wanted and _RESET not in states:
        resets = array(_RESET, tensor_pb2.DATA_TYPE_BOOL, ()).reshape(-1)
        if len(resets) != num_steps:
            raise InvalidInputError(
                f"inputs.{_RESET}",
                f"it has {len(resets)} values for {num_steps} steps: send one for each, [1, T]",
            )
    given_states = {}
    for name in sorted({*given} & {*states} - {*wanted}):
        values = array(name, states[name].dtype, api_shape(states[name]))
        if values.ndim != 1 + len(states[name].shape):
            raise InvalidInputError(
                f"inputs.{name}", f"a state has no axis for steps: send {[1, *api_shape(states[name])]}"
            )
        given_states[name] = values[0]
    steps = model.inputs.pack(steps_of, resets)
    if not model.inputs.are_finite(steps):
        raise InvalidInputError("inputs", "all values must be finite")
    return _Given(steps, has_steps_axis, given_states)


def _array(
    tensor: pb.ModelInferRequest.InferInputTensor,
    data_type: tensor_pb2.DataType.ValueType,
    step_shape: tuple[int, ...],
    raw: bytes | None,
) -> Array:
    """One input of a request: [1, ...shape], or [1, T, ...shape]."""
    field, name, dtype = f"inputs.{tensor.name}", type_name(data_type), numpy_dtype(data_type)
    if tensor.datatype != name:
        raise InvalidInputError(field, f"its datatype is {tensor.datatype!r}, the model's {name!r}")
    shape = tuple(tensor.shape)
    rank = len(shape) - len(step_shape)
    if rank not in (1, 2) or shape[rank:] != step_shape or min(shape) < 0:
        raise InvalidInputError(
            field, f"its shape is {list(shape)}: send {[1, *step_shape]}, or [1, T, ...] for T steps"
        )
    if shape[0] != 1:
        raise InvalidInputError(
            field,
            f"{shape[0]} rows in a request of one sequence: a request has one row; send one request for each sequence, "
            "at once or on one stream, and they run together (or BatchStep of ntm.v1, for many in one message)",
        )
    num_elements = math.prod(shape)
    if raw is None:
        if name not in _CONTENTS:
            raise InvalidInputError(
                field, f"{name} has no typed contents in the protocol: send its bytes in raw_input_contents"
            )
        contents = getattr(tensor.contents, _CONTENTS[name])
        if len(contents) != num_elements:
            raise InvalidInputError(field, f"it has {len(contents)} elements, its shape {num_elements}")
        return np.array(contents, dtype).reshape(shape)
    if len(raw) != num_elements * dtype.itemsize:
        raise InvalidInputError(
            field, f"it has {len(raw)} bytes, its shape takes {num_elements * dtype.itemsize}"
        )
    if dtype.kind == "b" and max(raw, default=0) > 1:
        raise InvalidInputError(field, "it has a byte that is neither 0 nor 1, in a BOOL tensor")
    return np.frombuffer(raw, dtype).reshape(shape)


def _wanted(request: pb.ModelInferRequest, model: StepModel) -> tuple[list[str], list[str]]:
    """The outputs and the states that a request asks for."""
    names = [output.name for output in request.outputs]
    if not names:
        return model.outputs.names, []
    states = [state.input_name for state in model.spec.states]
    for name in names:
        if name not in model.outputs.names and name not in states:
            raise InvalidInputError(
                "outputs",
                f"{name!r} is none: the model gives {model.outputs.names}, and has the states {states}",
            )
    return [n for n in names if n in model.outputs.names], [n for n in names if n in states]


def _add_output(answer: pb.ModelInferResponse, name: str, values: Array) -> None:
    answer.outputs.add(name=name, datatype=type_name(data_type(values.dtype)), shape=values.shape)
    answer.raw_output_contents.append(values.tobytes())


def _config_type(data_type: tensor_pb2.DataType.ValueType) -> pb.DataType.ValueType:
    return pb.DataType.Value(f"TYPE_{type_name(data_type)}")
