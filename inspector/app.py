"""The routes: what the page asks for, and the answers.

Small things travel as JSON, arrays as safetensors. What a route needs of a session is in `recorder.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from inspector import pictures, sequences, shown
from inspector.errors import BadRequestError, InspectorError, NotFoundError, TooLargeError
from inspector.recorder import Recorder, Recording
from inspector.security import Guard
from ntm import (
    AlreadyExistsError,
    AsyncClient,
    ClientError,
    DeadlineError,
    InvalidInputError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from ntm import NotFoundError as NoSuchSessionError
from ntm.v1 import model_pb2, session_pb2, tensor_pb2

STATIC = Path(__file__).parent / "static"
MAX_BODY_BYTES = 64 * 2**20
MAX_SESSIONS_LISTED = 200
_MAX_FRAMES_BYTES = 2**23

_HTTP_STATUS: dict[type[ClientError], int] = {
    NoSuchSessionError: 404,
    InvalidInputError: 400,
    AlreadyExistsError: 409,
    PreconditionError: 409,
    ResourceExhaustedError: 429,
    DeadlineError: 504,
    UnavailableError: 503,
}


def application(
    connect: Callable[[], AsyncClient],
    connection_lines: Sequence[str],
    address: str,
    *,
    token: str | None,
    host: str,
    is_loopback: bool,
    recording_limit_bytes: int,
) -> Starlette:
    """The web application over a server.

    Args:
        connect: makes the client, in the event loop that is to use it.
        connection_lines: Python that does the same.
        address: the server's, as people see it.
        token: as `Guard` takes it, and so are `host` and `is_loopback`.
        host: see there.
        is_loopback: see there.
        recording_limit_bytes: states that are kept to look back at, of all sessions together.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with connect() as client:
            app.state.client = client
            app.state.recorder = Recorder(client, connection_lines, recording_limit_bytes)
            app.state.address = address
            yield

    session = "/api/sessions/{session_id}"
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/api/server", _server),
            Route("/api/sessions", _sessions),
            Route("/api/sessions", _create, methods=["POST"]),
            Route("/api/import", _import, methods=["POST"]),
            Route(session, _delete, methods=["DELETE"]),
            Route(session, _show),
            Route(f"{session}/open", _open, methods=["POST"]),
            Route(f"{session}/follow", _follow),
            Route(f"{session}/timeline", _timeline),
            Route(f"{session}/frames", _frames),
            Route(f"{session}/sequence", _sequence, methods=["POST"]),
            Route(f"{session}/upload", _upload, methods=["POST"]),
            Route(f"{session}/advance", _advance, methods=["POST"]),
            Route(f"{session}/reset", _reset, methods=["POST"]),
            Route(f"{session}/fork", _fork, methods=["POST"]),
            Route(f"{session}/edit", _edit, methods=["POST"]),
            Route(f"{session}/export", _export),
            Route(f"{session}/animation", _animation),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, token=token, host=host, is_loopback=is_loopback)],
        exception_handlers={
            ClientError: _client_error,
            InspectorError: _inspector_error,
            HTTPException: _http_error,
        },
        lifespan=lifespan,
    )


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


async def _server(request: Request) -> Response:
    client: AsyncClient = request.app.state.client
    models = []
    for version in await client.models():
        info = await client.model(version.name, version.version)
        models.append(
            {
                "name": version.name,
                "version": version.version,
                "takes_sessions": version.state == 1,
                "task": info.spec.task,
                "input": _tensor(info.spec.inputs[0]),
                "output": _tensor(info.spec.outputs[0]),
                "kinds": [
                    {
                        "name": kind.name,
                        "title": kind.title,
                        "parameters": [asdict(parameter) for parameter in kind.parameters],
                    }
                    for kind in sequences.kinds(info.spec)
                ],
                "provider": info.execution.provider,
                "durability": info.durability.store,
            }
        )
    return JSONResponse({"address": request.app.state.address, "models": models})


async def _sessions(request: Request) -> Response:
    listed, are_more = await _recorder(request).sessions(
        request.query_params.get("model", ""), MAX_SESSIONS_LISTED
    )
    return JSONResponse({"sessions": [_described(session) for session in listed], "are_more": are_more})


async def _create(request: Request) -> Response:
    body = await _json(request)
    model = body.get("model")
    if not isinstance(model, str):
        raise BadRequestError("name a model")
    version = body.get("version")
    recording = await _recorder(request).create(model, version if isinstance(version, int) else None)
    return await _summary(request, recording)


async def _import(request: Request) -> Response:
    return await _summary(request, await _recorder(request).import_session(await _body(request)))


async def _open(request: Request) -> Response:
    return await _summary(request, await _recorder(request).open(request.path_params["session_id"]))


async def _show(request: Request) -> Response:
    return await _summary(request, _recording(request))


async def _follow(request: Request) -> Response:
    """A line of JSON whenever somebody else has stepped the session; an error is the last."""
    recorder, recording = _recorder(request), _recording(request)

    async def lines() -> AsyncIterator[str]:
        try:
            async for num_lost in recorder.follow(recording):
                yield json.dumps({"lost": num_lost}) + "\n"
        except ClientError as error:
            yield json.dumps({"error": str(error)}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _delete(request: Request) -> Response:
    await _recorder(request).delete(request.path_params["session_id"])
    return JSONResponse({})


async def _timeline(request: Request) -> Response:
    """Inputs, outputs, targets and small states from a moment on; `since` 0 begins with the base."""
    recording = _recording(request)
    since = _integer(request, "since", 0)
    arrays = {
        "inputs": recording.inputs.rows(),
        "outputs": recording.outputs.rows(),
        "targets": recording.targets.rows(),
    }
    tensors = {name: _floats(rows[max(0, since - 1) :]) for name, rows in arrays.items()}
    pending = recording.pending()
    if pending is not None:
        tensors["pending"] = _floats(pending)
    for name, lane in _lanes(recording).items():
        tensors[f"state.{name}"] = lane.shown(recording.states[name].rows()[since:])
    return _arrays(tensors)


async def _frames(request: Request) -> Response:
    """One state at some moments in a row, as it is shown."""
    recording = _recording(request)
    name, first, count = (
        request.query_params.get("name", ""),
        _integer(request, "first", 0),
        _integer(request, "count", 1),
    )
    if name not in recording.states:
        raise NotFoundError(f"the model has no state {name!r}")
    recording.check_moment(first)
    block = shown.frame(recording.states[name].shape)
    fitting = max(1, _MAX_FRAMES_BYTES // (4 * block.shown_rows * block.shown_columns))
    rows = recording.states[name].rows()[first : first + max(1, min(count, fitting))]
    return _arrays({"frames": block.shown(rows)})


async def _sequence(request: Request) -> Response:
    recording, body = _recording(request), await _json(request)
    if "values" in body:
        recording.set_sequence(sequences.by_hand(body["values"], recording.spec))
        return await _summary(request, recording)
    for kind in sequences.kinds(recording.spec):
        if kind.name == body.get("kind"):
            parameters = body.get("parameters", {})
            if not isinstance(parameters, dict):
                raise BadRequestError("parameters are names and numbers")
            recording.set_sequence(kind.sequence(parameters))
            return await _summary(request, recording)
    raise NotFoundError("there is no such kind of sequence for this model")


async def _upload(request: Request) -> Response:
    recording = _recording(request)
    name = request.query_params.get("name", "inputs.csv")
    recording.set_sequence(sequences.from_file(await _body(request), name, recording.spec))
    return await _summary(request, recording)


async def _advance(request: Request) -> Response:
    recording, body = _recording(request), await _json(request)
    steps = body.get("steps")
    if not isinstance(steps, int) or not 1 <= steps <= sequences.MAX_STEPS:
        raise BadRequestError(f"steps must be 1 to {sequences.MAX_STEPS}")
    await _recorder(request).advance(recording, steps)
    return await _summary(request, recording)


async def _reset(request: Request) -> Response:
    recording = _recording(request)
    async with recording.lock:
        await recording.reset()
    return await _summary(request, recording)


async def _fork(request: Request) -> Response:
    recording, body = _recording(request), await _json(request)
    forked = await _recorder(request).fork(recording, _whole(body, "moment"))
    return await _summary(request, forked)


async def _edit(request: Request) -> Response:
    recording, body = _recording(request), await _json(request)
    index, value = body.get("index"), body.get("value")
    if not isinstance(index, list) or not all(isinstance(i, int) for i in index):
        raise BadRequestError("index is a list of whole numbers")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequestError("value is a finite number")
    edited = await _recorder(request).edit(
        recording, _whole(body, "moment"), str(body.get("name")), tuple(index), float(value)
    )
    return await _summary(request, edited)


async def _export(request: Request) -> Response:
    recording = _recording(request)
    moment = _integer(request, "moment", recording.num_steps)
    snapshot = await _recorder(request).export(recording, moment)
    return Response(snapshot, media_type="application/octet-stream")


async def _animation(request: Request) -> Response:
    recording = _recording(request)
    is_dark = request.query_params.get("theme") == "dark"
    return Response(pictures.animation(recording, is_dark=is_dark), media_type="image/gif")


async def _summary(request: Request, recording: Recording) -> Response:
    """All that the page needs to know of a recording, but for arrays."""
    spec, lanes = recording.spec, _lanes(recording)
    described = recording.session
    states = []
    for state in spec.states:
        column = recording.states[state.input_name]
        rows = column.rows()
        states.append(
            {
                "name": state.input_name,
                "role": model_pb2.StateRole.Name(state.role).removeprefix("STATE_ROLE_").lower(),
                "dtype": rows.dtype.name,
                "shape": list(column.shape),
                "frame": shown.frame(column.shape).described(),
                "lane": lanes[state.input_name].described() if state.input_name in lanes else None,
                # A moment that nobody told us of is NaN; the base is not.
                "least": float(np.nanmin(rows)) if rows.size else 0.0,
                "most": float(np.nanmax(rows)) if rows.size else 0.0,
            }
        )
    sequence = recording.sequence
    return JSONResponse(
        {
            "session_id": described.session_id,
            "model": described.model.info.model.name,
            "version": described.model.info.model.version,
            "approximate": described.approximate,
            "recording_id": recording.recording_id,
            "first_step": recording.first_step,
            "num_steps": recording.num_steps,
            "resets": sorted(recording.resets),
            "states": states,
            "input": _tensor(spec.inputs[0]),
            "output": _tensor(spec.outputs[0]),
            "sequence": None
            if sequence is None
            else {
                "title": sequence.title,
                "num_steps": len(sequence.inputs),
                "position": recording.position,
                "are_bits": sequence.are_bits,
            },
            "program": _recorder(request).program(recording),
        }
    )


def _lanes(recording: Recording) -> dict[str, shown.Block]:
    """The states that the time line shows."""
    lanes = {}
    weightings = (model_pb2.STATE_ROLE_READ_WEIGHTING, model_pb2.STATE_ROLE_WRITE_WEIGHTING)
    for state in recording.spec.states:
        shape = recording.states[state.input_name].shape
        if state.role in weightings:
            lanes[state.input_name] = shown.attention(shape)
        elif math.prod(shape) <= shown.MAX_LANE_ELEMENTS and state.role != model_pb2.STATE_ROLE_MEMORY:
            lanes[state.input_name] = shown.Block(*shown.fold(shape), 1, 1)
    return lanes


def _tensor(spec: model_pb2.TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": tensor_pb2.DataType.Name(spec.dtype).removeprefix("DATA_TYPE_").lower(),
        "shape": list(spec.shape),
        "description": spec.description,
    }


def _described(session: session_pb2.Session) -> dict[str, Any]:
    described: dict[str, Any] = json_format.MessageToDict(
        session, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {**described, "next_step": session.next_step}


def _recorder(request: Request) -> Recorder:
    recorder: Recorder = request.app.state.recorder
    return recorder


def _recording(request: Request) -> Recording:
    return _recorder(request).get(request.path_params["session_id"])


def _floats(rows: np.ndarray[Any, Any]) -> shown.Floats:
    return np.ascontiguousarray(rows.reshape(len(rows), math.prod(rows.shape[1:])), np.float32)


def _arrays(tensors: dict[str, shown.Floats]) -> Response:
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return Response(safetensors.numpy.save(contiguous), media_type="application/octet-stream")


async def _body(request: Request) -> bytes:
    """The whole body.

    Raises:
        TooLargeError: it is larger than a file that is to be sent here.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise TooLargeError(f"a file of more than {MAX_BODY_BYTES // 2**20} MiB is not taken")
    return bytes(body)


async def _json(request: Request) -> dict[str, Any]:

    try:
        body = json.loads(await _body(request))
    except ValueError as error:
        raise BadRequestError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body


def _integer(request: Request, name: str, default: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or len(given) > 18:
        raise BadRequestError(f"{name} must be a whole number")
    return int(given)


def _whole(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequestError(f"{name} must be a whole number")
    return value


async def _client_error(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _HTTP_STATUS.items() if isinstance(error, kind)), 502)
    return JSONResponse({"error": str(error)}, status)


async def _inspector_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InspectorError)
    return JSONResponse({"error": str(error)}, error.http_status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)
