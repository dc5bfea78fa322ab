"""Decoders: everything that reads what somebody else wrote, with valid inputs to begin from and what it may raise.

Requests go through the services themselves, of a server that was built and does not listen, up to where the sessions
or the engine would be asked: there `Reached` is raised, and the input counts as accepted.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import jwt
import numpy as np
import onnx
import safetensors.numpy
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from ntm import _errors as client_errors
from ntm._results import watched
from ntm._steps import outputs_of
from ntm.tensor import TensorError, to_array, to_message
from ntm.v1 import model_pb2, model_service_pb2, session_service_pb2, tensor_pb2
from server import triton_config
from server.errors import (
    InvalidInputError,
    ModelFileError,
    SecurityFileError,
    ServingError,
    StoreSettingsError,
    UnauthenticatedError,
)
from server.launch import Server, build
from server.model import spec
from server.model.describe import draft
from server.rpc import status
from server.rpc.inference import grpc_service_pb2
from server.rpc.model_service import ModelService
from server.security import credentials, jwts, principals
from server.security.tokens import TokenFile, line_of
from server.security.watched_files import WatchedFiles
from server.settings import ServerSettings
from server.storage import codec, sqlite_guard
from server.storage.interface import Record
from tests import foreign_models, step_models
from tests.fuzz.mutations import changed_json, changed_message, changed_text, damaged
from tests.server.test_triton_config import write as write_triton_model

MODELS = {
    "accumulator": step_models.accumulator,
    "many": step_models.many_layouts,
    "several": foreign_models.several,
    "whole": foreign_models.no_batch_axis,
}
"""One input or several, of one type or several, with states of every layout."""


class Reached(Exception):  # noqa: N818
    """The checks are passed: here the work would begin."""

    num_raised = 0

    def __init__(self) -> None:
        super().__init__()
        Reached.num_raised += 1


@dataclass(frozen=True)
class Decoder:
    """Something that reads bytes."""

    name: str
    share: int
    """Of every thousand inputs."""
    make: Callable[[random.Random], bytes]
    """An input: a valid one, changed."""
    decode: Callable[[bytes], Awaitable[object] | object]
    """Reads it; returns, or raises `Reached`, where it is accepted."""
    refusals: tuple[type[Exception], ...]
    """What it says that it raises for what is wrong."""


class _Context:
    """What a service asks of its call."""

    def invocation_metadata(self) -> tuple[()]:
        """The caller sent nothing beside its request."""
        return ()


_CONTEXT = _Context()


@asynccontextmanager
async def all_decoders(directory: Path) -> AsyncIterator[list[Decoder]]:
    """Every decoder, with a server to ask, in an empty directory."""
    for name, make in MODELS.items():
        step_models.write(directory / "models", make(), name)
    settings = ServerSettings(
        models=directory / "models",
        store="none",
        device="cpu",
        max_steps_per_message=16,
        max_message_bytes=128 * 1024,
    )  # type: ignore[call-arg]
    server = await build(settings)
    for name in MODELS:
        await server.sessions.create(name, None, f"s-{name}", "")
    _stop_at_the_engine(server)
    try:
        yield [
            *_of_session_service(server),
            *_of_model_service(server),
            *_of_inference_service(server),
            *_of_models(directory),
            *_of_storage(server, directory),
            *_of_security(directory),
            *_of_client(),
        ]
    finally:
        await server.close()


def _stop_at_the_engine(server: Server) -> None:
    """What a call asks of the sessions is where it has passed the checks."""
    sessions = server.sessions

    def reached(*_: object, **__: object) -> Any:
        raise Reached

    async def reached_later(*_: object, **__: object) -> Any:
        raise Reached

    async def create(
        name: str, version: int | None, session_id: str, request_id: str, given: Mapping[str, np.ndarray]
    ) -> Any:
        spec.initial_state(sessions.models.find(name, version).model.spec, given)
        raise Reached

    async def import_snapshot(data: bytes, session_id: str, request_id: str) -> Any:
        creation._read_snapshot(data)
        raise Reached

    creation: Any = sessions.import_snapshot.__self__  # type: ignore[attr-defined]
    sessions.executor.admit = reached  # type: ignore[method-assign]
    sessions.create, sessions.import_snapshot = create, import_snapshot  # type: ignore[assignment]
    for name in ("get", "page", "delete", "reset", "fork", "state", "export", "step", "step_alone"):
        setattr(sessions, name, reached_later)
    sessions.watching.watch = reached  # type: ignore[method-assign]


# Requests.


def _from_messages(*messages: Message) -> Callable[[random.Random], bytes]:
    """Changed messages, of which some are damaged as bytes."""

    def make(chance: random.Random) -> bytes:
        message = type(first := chance.choice(messages))()
        message.CopyFrom(first)
        if chance.random() < 0.8:
            changed_message(message, chance)
        data = message.SerializeToString()
        return damaged(data, chance) if chance.random() < 0.3 else data

    return make


def _named(**arrays: Any) -> list[tensor_pb2.NamedTensor]:
    return [
        tensor_pb2.NamedTensor(name=name, value=to_message(np.asarray(array)))
        for name, array in arrays.items()
    ]


def _zeros(tensors: Any, *leading: int) -> dict[str, np.ndarray]:
    return {t.name: np.zeros((*leading, *t.shape), spec.numpy_dtype(t.dtype)) for t in tensors}


def _of_session_service(server: Server) -> Iterator[Decoder]:
    service, pb = server._session_service, session_service_pb2
    model_of = {s.model.name: s.model for s in server.sessions.models}
    steps, batches, creations = [], [], [pb.CreateSessionRequest(model_name="many", request_id="r")]
    for name, model in model_of.items():
        one = pb.StepRequest(session_id=f"s-{name}", first_step=0)
        batch = pb.BatchStepRequest(session_ids=[f"s-{name}"], first_steps=[0])
        for request, leading in ((one, (2,)), (batch, (1, 2))):
            given = _zeros(model.spec.inputs, *leading)
            if len(given) == 1:
                request.inputs.CopyFrom(to_message(next(iter(given.values()))))
            else:
                request.named_inputs.extend(_named(**given))
            request.resets.CopyFrom(to_message(np.zeros(leading, np.bool_)))
        one.include_state.append(model.spec.states[0].input_name)
        one.trace_state.append(model.spec.states[0].input_name)
        steps.append(one)
        batches.append(batch)
        states = {s.input_name: s for s in model.spec.states}
        values = {n: np.zeros(spec.api_shape(s), spec.numpy_dtype(s.dtype)) for n, s in states.items()}
        creations.append(
            pb.CreateSessionRequest(model_name=name, session_id="n", initial_state=_named(**values))
        )
        snapshots = [_snapshot(each) for each in model_of.values()]
    plain: dict[str, tuple[int, list[Message]]] = {
        "CreateSession": (60, [*creations]),
        "GetSession": (15, [pb.GetSessionRequest(session_id="s-many", owner="o")]),
        "ListSessions": (
            20,
            [pb.ListSessionsRequest(page_size=5, page_token=base64.urlsafe_b64encode(b"s-many").decode())],
        ),
        "DeleteSession": (15, [pb.DeleteSessionRequest(session_id="s-many", allow_missing=True)]),
        "ResetSession": (15, [pb.ResetSessionRequest(session_id="s-many", at_step=0)]),
        "Step": (150, [*steps]),
        "BatchStep": (100, [*batches]),
        "GetState": (20, [pb.GetStateRequest(session_id="s-many", names=["memory", "count"])]),
        "WatchSession": (15, [pb.WatchSessionRequest(session_id="s-many", include_state=["memory"])]),
        "ForkSession": (20, [pb.ForkSessionRequest(source_session_id="s-many", session_id="f", at_step=1)]),
        "ExportSession": (15, [pb.ExportSessionRequest(session_id="s-many")]),
        "ImportSession": (30, [pb.ImportSessionRequest(session_id="i", snapshot=each) for each in snapshots]),
    }
    for rpc, (share, requests) in plain.items():
        yield _rpc(f"ntm.v1 {rpc}", share, requests, getattr(service, rpc))

    async def enter(request: Any, _: object) -> None:
        await service._enter_next(request.step, None)

    yield _rpc("ntm.v1 StreamSteps", 40, [pb.StreamStepsRequest(step=each) for each in steps], enter)


def _of_model_service(server: Server) -> Iterator[Decoder]:
    pb, service = model_service_pb2, ModelService(server.sessions, server._session_service._limits, "native")
    yield _rpc("ntm.v1 ListModels", 5, [pb.ListModelsRequest()], service.ListModels)
    yield _rpc(
        "ntm.v1 GetModel", 10, [pb.GetModelRequest(model_name="many", model_version=1)], service.GetModel
    )


def _of_inference_service(server: Server) -> Iterator[Decoder]:
    pb, service = grpc_service_pb2, server._inference
    inferences = []
    for served in server.sessions.models:
        for is_raw in (True, False):
            request = pb.ModelInferRequest(model_name=served.model.name)
            request.parameters["sequence_id"].string_param = "q"
            request.parameters["sequence_start"].bool_param = True
            request.parameters["first_step"].int64_param = 0
            for name, array in _zeros(served.model.spec.inputs, 1, 2).items():
                kind = spec.type_name(spec.data_type(array.dtype))
                tensor = request.inputs.add(name=name, datatype=kind, shape=array.shape)
                if is_raw:
                    request.raw_input_contents.append(array.tobytes())
                else:
                    field = "int64_contents" if kind == "INT64" else f"fp{kind[2:]}_contents"
                    getattr(tensor.contents, field).extend(array.ravel().tolist())
            request.outputs.add(name=served.model.spec.outputs[0].name)
            inferences.append(request)
    yield _rpc("inference ModelInfer", 120, inferences, service.ModelInfer)
    for method in grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        if method.name not in ("ModelInfer", "ModelStreamInfer"):
            request = getattr(pb, method.input_type.name)()
            for field, value in (("name", "many"), ("version", "1")):
                if field in request.DESCRIPTOR.fields_by_name:
                    setattr(request, field, value)
            yield _rpc(f"inference {method.name}", 5, [request], getattr(service, method.name))

    async def stream(request: Any, _: object) -> None:
        """A stream answers with an error, and never ends with one."""
        answers: list[Any] = []
        messages, num_reached = [request], Reached.num_raised

        async def read() -> Any:
            return messages.pop() if messages else grpc.aio.EOF

        async def write(answer: Any) -> None:
            answers.append(answer)

        await service.ModelStreamInfer(
            None, SimpleNamespace(read=read, write=write, invocation_metadata=tuple)
        )  # type: ignore[arg-type]
        [answer] = answers
        if Reached.num_raised > num_reached:
            raise Reached
        assert answer.error_message != status.of(AssertionError()).message, "an exception of no type of ours"
        raise InvalidInputError("", answer.error_message)

    yield _rpc("inference ModelStreamInfer", 20, inferences, stream)


def _rpc(name: str, share: int, requests: list[Any], call: Callable[..., Any]) -> Decoder:
    message_type = type(requests[0])

    async def decode(data: bytes) -> None:
        await call(message_type.FromString(data), _CONTEXT)

    return Decoder(name, share, _from_messages(*requests), decode, (DecodeError, ServingError))


# Models.


def _of_models(directory: Path) -> Iterator[Decoder]:
    contents = [make() for make in (*MODELS.values(), foreign_models.open_axes)]
    read = [step_models.read_back(content) for content in contents]
    graphs = [step.graph for step, _ in read]
    specs = [declared for _, declared in read]

    def hold(declared: model_pb2.ModelSpec) -> None:
        problems = [[*spec.differences(declared, graph)] for graph in graphs]
        if all(problems):
            raise ModelFileError("", problems[0])

    def make_json(chance: random.Random) -> bytes:
        said = json.loads(json_format.MessageToJson(chance.choice(specs)))
        for _ in range(chance.randint(1, 3)):
            said = changed_json(said, chance)
        data = json.dumps(said).encode("utf-8", "surrogatepass")
        return damaged(data, chance) if chance.random() < 0.2 else data

    fixed = directory / "fixed"
    step_models.write(fixed, contents[0], "m")
    path = fixed / "m" / "1" / "model.onnx"
    step = onnx.load(path)
    del step.metadata_props[:]

    def read_json(data: bytes) -> None:
        path.with_name(spec.SIDECAR_NAME).write_bytes(data)
        hold(spec._read_spec(path, step))

    def read_file(data: bytes) -> None:
        model = directory / "file" / "model.onnx"
        model.parent.mkdir(exist_ok=True)
        model.write_bytes(data)
        try:
            loaded = spec.load(model, "m", 1)
        except ModelFileError:
            draft(model, draft.__globals__["Hints"]())  # what `describe` makes of what the server refuses
            raise
        for state in loaded.spec.states:
            spec.initial_value(state)

    triton = directory / "triton"
    triton.mkdir()
    config = write_triton_model(triton, initial='data_file: "first.bin"')
    text = config.read_text()

    def make_config(chance: random.Random) -> bytes:
        data = changed_text(text, chance).encode()
        return damaged(data, chance) if chance.random() < 0.2 else data

    def read_config(data: bytes) -> None:
        config.write_bytes(data)
        triton_config.read(config)

    yield Decoder("ModelSpec, JSON", 30, make_json, read_json, (ModelFileError,))
    yield Decoder(
        "ModelSpec, protobuf",
        40,
        _from_messages(*specs),
        lambda data: hold(model_pb2.ModelSpec.FromString(data)),
        (DecodeError, ModelFileError),
    )
    files = [onnx.load_from_string(content) for content in contents]
    yield Decoder("model files", 10, _from_messages(*files), read_file, (ModelFileError,))
    yield Decoder("config.pbtxt", 15, make_config, read_config, (ModelFileError,))


# Stores.


def _snapshot(model: spec.StepModel) -> bytes:
    state = {s.input_name: spec.initial_value(s) for s in model.spec.states}
    given = codec.encode_initial_state(dict([*state.items()][:1]))
    return codec.encode_snapshot(model, 7, state, given)


def _of_storage(server: Server, directory: Path) -> Iterator[Decoder]:
    models = [served.model for served in server.sessions.models]

    def make_snapshot(chance: random.Random) -> bytes:
        data = _snapshot(chance.choice(models))
        if chance.random() < 0.5:
            return damaged(data, chance)
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(changed_json(json.loads(data[8 : 8 + length]), chance)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    def make_whole_snapshot(chance: random.Random) -> bytes:
        """Other tensors and numbers, whose checksum is right."""
        model = chance.choice(models)
        data = _snapshot(model)
        metadata = codec.snapshot_metadata(data)
        tensors = safetensors.numpy.load(data)
        name = chance.choice([*tensors])
        tensors[name] = chance.choice(
            [tensors[name].astype(np.float16), tensors[name] * np.nan, tensors[name].ravel(), np.zeros(3)]
        )
        tensors[chance.choice([name, "other", "ntm.initial.other"])] = tensors[name]
        next_step = chance.choice([0, 5, 2**52, 2**52 + 1, -1])
        begun = {n: tensors[n] for n in sorted(tensors) if n.startswith("ntm.initial.")}
        ordered = {s.input_name: tensors[s.input_name] for s in model.spec.states} | begun
        metadata |= {"next_step": str(next_step), "crc32": f"{codec._state_checksum(ordered, next_step):08x}"}
        return safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, metadata)

    def read_snapshot(data: bytes) -> None:
        name = codec.snapshot_metadata(data)["model_name"]
        for model in models:
            if model.name == name:
                codec.decode_snapshot(model, data)
                return
        raise codec.DamagedError("no model has its name")

    def make_record(chance: random.Random) -> bytes:
        model = models[0]
        inputs, outputs = (layout.none(3) for layout in (model.inputs, model.outputs))
        data = codec.encode_record("s", 4, inputs, outputs, b"12345678").content
        if chance.random() < 0.5:
            return damaged(data, chance)
        # Whole by its checksum, and of other lengths.
        body = chance.choice([data[24:], data[24:-1], b"", data[24:] * 2])
        first_step = chance.choice([4, 4, 0, -1, 2**62])
        num_steps = chance.choice([3, 3, 0, 1, 2**32 - 1, 2**31])
        checksum = codec._record_checksum("s", first_step, num_steps, b"12345678", body)
        return codec._HEADER.pack(checksum, first_step, num_steps, b"12345678") + body

    def make_entry(chance: random.Random) -> bytes:
        failure = codec.Failure(3, "digest", "STEP_FAILED", -1)
        metadata = codec.SessionMetadata("r", 1, "d", 1.0, 5, 9, (1, 2), "here", failure=failure)
        if chance.random() < 0.3:
            return damaged(metadata.encode(), chance)
        changed = changed_json(json.loads(json.dumps(asdict(metadata))), chance)
        text = json.dumps(changed).encode("utf-8", "surrogatepass")
        if chance.random() < 0.1:
            text = damaged(text, chance)
        return b"%08x" % zlib.crc32(text) + text

    def make_initial(chance: random.Random) -> bytes:
        model = models[0]
        state = {s.input_name: spec.initial_value(s) for s in model.spec.states}
        data = damaged(safetensors.numpy.save(state), chance)
        return base64.b64encode(data) if chance.random() < 0.9 else data

    def read_initial(data: bytes) -> None:
        codec.decode_initial_state(data.decode("latin-1"), models[0])

    def make_count(chance: random.Random) -> bytes:
        return damaged(b"ntm.commits power 1234-5678 %020d\n" % chance.randrange(2**40), chance)

    guard = sqlite_guard.SqliteGuard(directory / "counted")

    def read_count(data: bytes) -> None:
        guard.count_path.write_bytes(data)
        if guard.count() is None:
            raise StoreSettingsError("no count")

    refusals = (codec.DamagedError,)
    yield Decoder("session snapshots", 50, make_snapshot, read_snapshot, refusals)
    yield Decoder("session snapshots, checksum right", 10, make_whole_snapshot, read_snapshot, refusals)
    yield Decoder(
        "stored records",
        40,
        make_record,
        lambda d: codec.decode_record("s", Record(4, d), models[0]),
        refusals,
    )
    yield Decoder("stored entries", 40, make_entry, codec.SessionMetadata.decode, refusals)
    yield Decoder("stored initial states", 20, make_initial, read_initial, refusals)
    yield Decoder("count of commits", 5, make_count, read_count, (StoreSettingsError,))


# Security.


def _of_security(directory: Path) -> Iterator[Decoder]:
    # Always the same, so that an input can be made anew; signatures and dates are not.
    key = ec.derive_private_key(2**200 + 1, ec.SECP256R1())
    other = rsa.RSAPublicNumbers(65537, 2**2047 + 2**1000 + 1).public_key()
    described = [
        ECAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": "k"},
        RSAAlgorithm.to_jwk(other, as_dict=True) | {"kid": "r", "use": "sig"},
    ]
    keys = directory / "keys.json"
    keys.write_text(json.dumps({"keys": described}))
    issuer = jwts.JwtIssuer("https://issuer", "ntm", str(keys))
    verifier = jwts.JwtVerifier(issuer)
    claims = {
        "sub": "alice",
        "iss": "https://issuer",
        "aud": ["ntm", "other"],
        "exp": int((datetime.now(UTC) + timedelta(days=1)).timestamp()),
    }

    def encoded(value: Any) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode("utf-8", "surrogatepass")).rstrip(b"=")

    signed = jwt.encode(claims, key, "ES256", headers={"kid": "k"}).encode()

    def make_token(chance: random.Random) -> bytes:
        what = chance.random()
        if what < 0.4:
            return damaged(signed, chance)
        header = {"alg": "ES256", "kid": "k", "typ": "JWT"}
        if what < 0.8:
            parts = [encoded(changed_json(header, chance)), encoded(changed_json(claims, chance)), b"AAAA"]
            return b".".join(parts)
        # Signed by the issuer itself, whatever it says.
        content = json.dumps(changed_json(claims, chance)).encode("utf-8", "surrogatepass")
        return jwt.api_jws.encode(content, key, "ES256", headers={"kid": "k"}).encode()

    async def read_token(data: bytes) -> None:
        verifier._known.clear()
        await verifier.verify(data.decode("latin-1"))

    def make_metadata(chance: random.Random) -> bytes:
        return damaged(b"Bearer " + signed[:40], chance)

    lines = "\n".join(["# who may call", line_of("alice", "a"), line_of("bob", "b"), ""]).encode()
    tokens = directory / "tokens"

    def read_tokens(data: bytes) -> None:
        tokens.write_bytes(data)
        TokenFile(tokens, WatchedFiles([tokens])).name_of("a")

    public = [
        each.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        for each in (
            key.public_key(),
            other,
            ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key(),
        )
    ]

    def make_keys(chance: random.Random) -> bytes:
        if chance.random() < 0.3:
            return _damaged_pem(chance.choice(public), chance)
        data = json.dumps(changed_json({"keys": described}, chance)).encode("utf-8", "surrogatepass")
        return damaged(data, chance) if chance.random() < 0.2 else data

    def read_keys(data: bytes) -> None:
        keys_then = directory / "keys.now"
        keys_then.write_bytes(data)
        jwts.JwtVerifier(jwts.JwtIssuer("i", "a", str(keys_then)))

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")])
    now = datetime.now(UTC)
    certificates = [
        x509.CertificateBuilder(name, subject, key.public_key(), 1, now, now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("alice.example")]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        for subject in (name, x509.Name([]))
    ]

    def make_certificate(chance: random.Random) -> bytes:
        return _damaged_pem(chance.choice(certificates), chance)

    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files = credentials.TlsFiles(Path("certificate"), Path("key"), Path("authorities"))

    def make_pair(chance: random.Random) -> bytes:
        parts = [certificates[0], private, certificates[1]]
        place = chance.randrange(3)
        parts[place] = _damaged_pem(parts[place], chance)
        return b"\0\0".join(parts)

    def read_pair(data: bytes) -> None:
        parts = data.split(b"\0\0")
        credentials._check(files, [*parts, b"", b""][:3])

    yield Decoder("server's certificate and key", 10, make_pair, read_pair, (SecurityFileError,))
    yield Decoder("JWTs", 40, make_token, read_token, (UnauthenticatedError,))
    yield Decoder(
        "bearer metadata",
        20,
        make_metadata,
        lambda data: principals.bearer_token([("authorization", data.decode("latin-1"))]),
        (UnauthenticatedError,),
    )
    yield Decoder("token files", 10, lambda c: damaged(lines, c), read_tokens, (SecurityFileError,))
    yield Decoder("key sets and PEM", 10, make_keys, read_keys, (SecurityFileError,))
    yield Decoder("certificates", 10, make_certificate, principals._name_and_end, (UnauthenticatedError,))


def _damaged_pem(pem: bytes, chance: random.Random) -> bytes:
    """As text, or as what it stands for."""
    if chance.random() < 0.2:
        return damaged(pem, chance)
    first, *body, last = pem.strip().split(b"\n")
    content = damaged(base64.b64decode(b"".join(body)), chance)
    return b"\n".join([first, base64.b64encode(content), last, b""])


# The client.


def _of_client() -> Iterator[Decoder]:
    pb = session_service_pb2
    tensors = [
        to_message(np.zeros(shape, dtype)) for shape in ((2, 3), (4,), ()) for dtype in ("f4", "i8", "?")
    ]
    answer = pb.StepResponse(next_step=2, named_outputs=_named(a=np.zeros((2, 3), "f4"), b=np.zeros(2, "i8")))
    batch = pb.BatchStepResponse(next_steps=[1], outputs=to_message(np.zeros((1, 1, 3), "f4")))
    seen = pb.WatchSessionResponse(first_step=1, step=answer, named_inputs=_named(x=np.zeros((2, 3), "f4")))
    seen.step.state.add(name="sum", value=tensors[0])

    def read_answer(data: bytes) -> None:
        outputs_of(pb.StepResponse.FromString(data))

    def read_batch(data: bytes) -> None:
        outputs_of(pb.BatchStepResponse.FromString(data), 2)

    def read_watched(data: bytes) -> None:
        watched(pb.WatchSessionResponse.FromString(data))

    details = status_pb2.Status(code=9, message="m")
    info = error_details_pb2.ErrorInfo(reason="STEP_GAP", domain="ntm.v1", metadata={"next_step": "4"})
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(20)
    for detail in (info, retry):
        details.details.add().Pack(detail)

    def make_status(chance: random.Random) -> bytes:
        changed_details = status_pb2.Status.FromString(details.SerializeToString())
        del changed_details.details[:]
        for detail in (info, retry):
            other = type(detail).FromString(detail.SerializeToString())
            if chance.random() < 0.7:
                changed_message(other, chance)
            changed_details.details.add().Pack(other)
        data = changed_details.SerializeToString()
        return damaged(data, chance) if chance.random() < 0.3 else data

    def read_status(data: bytes) -> None:
        failed = SimpleNamespace(
            code=lambda: grpc.StatusCode.FAILED_PRECONDITION,
            details=lambda: "m",
            trailing_metadata=lambda: [(client_errors._STATUS_DETAILS_KEY, data)],
        )
        error = client_errors.from_rpc(failed)  # type: ignore[arg-type]
        if isinstance(error, client_errors.StepOrderError):
            assert error.next_step is None or error.next_step >= 0

    refusals = (DecodeError, TensorError)
    yield Decoder(
        "client: tensors",
        50,
        _from_messages(*tensors),
        lambda data: to_array(tensor_pb2.Tensor.FromString(data)),
        refusals,
    )
    yield Decoder("client: answers", 20, _from_messages(answer), read_answer, refusals)
    yield Decoder("client: batches", 10, _from_messages(batch), read_batch, refusals)
    yield Decoder("client: watched", 10, _from_messages(seen), read_watched, refusals)
    yield Decoder("client: statuses", 10, make_status, read_status, ())


async def awaited(result: Awaitable[object] | object) -> None:
    """What a decoder returned."""
    if asyncio.iscoroutine(result):
        await result
