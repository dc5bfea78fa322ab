"""Codec: what a store keeps of a session, as bytes, and how damage to it is noticed.

A session is its last snapshot and the records since: one record for each request, with the inputs it had and the
outputs it gave. A snapshot is a safetensors file, the same that ExportSession gives. Everything carries a checksum,
since a store can return what it was not given; a store itself (`server/storage`) looks into none of it.

Shapes: T steps of a request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import safetensors.numpy
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError

from ntm.tensor import Array, numpy_dtype
from server.model.layout import Steps
from server.model.spec import StepModel, api_shape, from_api, initial_value, to_api
from server.runtime.provider import Device
from server.storage.interface import Record

FORMAT = "ntm.v1"
MAX_IMPORTED_STEP = 2**52
"""A session counts on from there for longer than anybody lives, in numbers that every store keeps exactly (Valkey's
scripts have 53 bits for them)."""
_MAX_HEADER_BYTES = 2**18
"""Of a safetensors file: names, shapes and metadata."""
# Of entries and the records that go with them. 1 had the inputs of a step without its reset.
_FORMAT_VERSION = 2
# Before the names of tensors that say what a session began from; no model has a name that begins so.
_INITIAL = "ntm.initial."

# Checksum, first step, number of steps, fingerprint; then the inputs and the outputs.
_HEADER = struct.Struct("<IqI8s")


class DamagedError(Exception):
    """Bytes that are not what was written."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed: a repeat of it gets the same answer."""

    first_step: int
    inputs_digest: str
    kind: Literal["STEP_FAILED", "OUTPUT_NOT_FINITE"]
    step: int
    """Where an output was not finite; -1 for a step that raised."""


@dataclass(frozen=True, slots=True)
class SessionMetadata:
    """What an entry says of its session beside its id, its counter and its last use."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    request: str
    """What the request that made it asked for, so that a repeat is told from another request."""
    model_version: int
    model_digest: str
    create_time_s: float
    """Seconds since the epoch."""
    snapshot_step: int
    """The snapshot is the state before this step."""
    snapshot_checksum: int = 0
    """Tells the snapshot from every other; 0: there is none, and it is the model's initial state."""
    reset_steps: tuple[int, ...] = ()
    """Where it was reset, as far as that is on record."""
    fingerprint: str = ""
    """On what the records since the snapshot were written."""
    is_approximate: bool = False
    """It was once replayed on another machine or build than it ran on."""
    num_recoveries: int = 0
    """Replays begun and not finished: a recovery that brings the server down must not be tried for ever."""
    failure: Failure | None = None
    """The last request, if it failed."""
    end_reason: Literal["", "DELETED", "EXPIRED"] = ""
    initial_state: str = ""
    """What it began from and a reset returns to, as `encode_initial_state` gives it; empty: the model's own."""
    format: int = _FORMAT_VERSION

    def check_snapshot(self, snapshot: bytes) -> None:
        """That the snapshot is this session's last; b"" for none.

        Raises:
            DamagedError: it is missing, or another.
        """
        if zlib.crc32(snapshot) != self.snapshot_checksum:
            raise DamagedError("the snapshot is missing, or is not what was written")

    def with_snapshot(
        self, snapshot: bytes, step: int, reset_steps: tuple[int, ...], where: Fingerprint
    ) -> SessionMetadata:
        """The same with a snapshot of the state before a step, written here; nothing is left to be replayed."""
        return replace(
            self,
            snapshot_step=step,
            snapshot_checksum=zlib.crc32(snapshot),
            reset_steps=reset_steps,
            fingerprint=where.text,
            num_recoveries=0,
        )

    def ended(self, reason: Literal["DELETED", "EXPIRED"]) -> SessionMetadata:
        """The same of a session that has ended, without what is of no use any more: many are kept."""
        return replace(
            self,
            snapshot_checksum=0,
            reset_steps=(),
            fingerprint="",
            failure=None,
            end_reason=reason,
            initial_state="",
        )

    def encode(self) -> bytes:
        """As an entry's content."""
        text = json.dumps(asdict(self), separators=(",", ":")).encode()
        return b"%08x" % zlib.crc32(text) + text

    @staticmethod
    def decode(content: bytes) -> SessionMetadata:
        """What `encode` gave.

        Raises:
            DamagedError: this is something else.
        """
        text = content[8:]
        if content[:8] != b"%08x" % zlib.crc32(text):
            raise DamagedError("the entry's checksum is wrong")
        try:
            fields = json.loads(text)
            is_of_another_version = fields.get("format", 1) != _FORMAT_VERSION
        except (ValueError, AttributeError, RecursionError) as error:
            raise DamagedError("the entry is no JSON of a session's metadata") from error
        if is_of_another_version:
            raise DamagedError(
                "it was written by another version of the server, whose records this one does not read: take it out "
                "there with ExportSession and bring it in here with ImportSession, or delete it"
            )
        try:
            return _METADATA.validate_json(text)
        except ValidationError as error:
            raise DamagedError("the entry has fields that a session's metadata has not") from error


_METADATA = TypeAdapter(SessionMetadata)


@dataclass(frozen=True, slots=True)
class RecordedSteps:
    """A request as it was applied."""

    first_step: int
    inputs: Steps
    """[T]."""
    outputs: Steps
    """[T]."""
    fingerprint: bytes

    @property
    def end_step(self) -> int:
        """The step after its last."""
        return self.first_step + len(self.inputs)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """On what a model's steps ran: elsewhere they may round differently."""

    text: str
    """For people."""
    digest: bytes
    """8 bytes, in every record."""


def fingerprint(model: StepModel, device: Device, padded_batch_size: int | None) -> Fingerprint:
    """The fingerprint of what runs here."""
    text = f"onnxruntime {ort.__version__}, {device.provider}, {device.processor}"
    if padded_batch_size:
        text += f", batches of {padded_batch_size}"
    return Fingerprint(text, hashlib.sha256(f"{text}, {model.digest}".encode()).digest()[:8])


def encode_record(session_id: str, first_step: int, inputs: Steps, outputs: Steps, where: bytes) -> Record:
    """A request's record.

    Args:
        session_id: whose it is; a record in another session's place is damage.
        first_step: index of the first step.
        inputs: [T].
        outputs: [T].
        where: the fingerprint's digest.
    """
    body = inputs.tobytes() + outputs.tobytes()
    num_steps = len(inputs)
    checksum = _record_checksum(session_id, first_step, num_steps, where, body)
    return Record(first_step, _HEADER.pack(checksum, first_step, num_steps, where) + body)


def decode_record(session_id: str, record: Record, model: StepModel) -> RecordedSteps:
    """What a record says.

    Raises:
        DamagedError: it is not what was written, or not a record of this session and model.
    """
    if len(record.content) < _HEADER.size:
        raise DamagedError(f"the record of step {record.first_step} is cut short")
    checksum, first_step, num_steps, where = _HEADER.unpack_from(record.content)
    body = record.content[_HEADER.size :]
    if checksum != _record_checksum(session_id, first_step, num_steps, where, body):
        raise DamagedError(f"the checksum of the record of step {record.first_step} is wrong")
    input_bytes = num_steps * model.inputs.step_bytes
    if first_step != record.first_step or len(body) != input_bytes + num_steps * model.outputs.step_bytes:
        raise DamagedError(f"the record of step {record.first_step} is of another session or model")
    inputs = np.frombuffer(body[:input_bytes], model.inputs.dtype)
    outputs = np.frombuffer(body[input_bytes:], model.outputs.dtype)
    return RecordedSteps(first_step, inputs, outputs, where)


def check_unbroken(requests: Sequence[RecordedSteps], snapshot_step: int, next_step: int) -> None:
    """That the records lead from the snapshot to the counter without a gap.

    Raises:
        DamagedError: they do not.
    """
    step = requests[0].first_step if requests else snapshot_step
    meets_snapshot = step == snapshot_step
    for request in requests:
        if request.first_step != step:
            raise DamagedError(f"the record of step {step} is missing")
        step = request.end_step
        meets_snapshot = meets_snapshot or step == snapshot_step
    if step != next_step or not meets_snapshot:
        raise DamagedError(
            f"the records end at step {step}, the snapshot is of step {snapshot_step}, and the session's next step "
            f"is {next_step}"
        )


def encode_initial_state(values: Mapping[str, Array]) -> str:
    """The values of some states, in the graph's axes, as text; "" for none."""
    return base64.b64encode(safetensors.numpy.save(dict(values))).decode() if values else ""


def decode_initial_state(text: str, model: StepModel) -> dict[str, Array]:
    """The whole state that a session with such values begins from, in the graph's axes.

    Raises:
        DamagedError: they are not of this model.
    """
    state = {spec.input_name: initial_value(spec) for spec in model.spec.states}
    if not text:
        return state
    try:
        values: dict[str, Array] = safetensors.numpy.load(base64.b64decode(text, validate=True))
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"its initial state is not what was written: {error}") from error
    for name, value in values.items():
        if name not in state or (value.dtype, value.shape) != (state[name].dtype, state[name].shape):
            raise DamagedError(f"its initial state has {name!r} as the model has not")
        if not np.isfinite(value).all():
            raise DamagedError(f"its initial state has values of {name!r} that are not finite")
    return state | values


def encode_snapshot(
    model: StepModel, next_step: int, state: Mapping[str, Array], initial_state: str = ""
) -> bytes:
    """A session's whole state, as a safetensors file with metadata.

    Args:
        model: the session's model.
        next_step: its counter.
        state: by name, [...state shape] each, in the graph's axes; the file has the API's.
        initial_state: as the session's metadata has it, where the snapshot is all that will be known of it.
    """
    tensors = {
        spec.input_name: np.array(to_api(spec, state[spec.input_name]), order="C")
        for spec in model.spec.states
    }
    begun_from = _initial_tensors(initial_state)
    return safetensors.numpy.save(
        tensors | begun_from,
        {
            "format": FORMAT,
            "model_name": model.name,
            "model_version": str(model.version),
            "model_digest": model.digest,
            "next_step": str(next_step),
            "crc32": f"{_state_checksum(tensors | begun_from, next_step):08x}",
        },
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session's whole state at a step."""

    metadata: dict[str, str]
    next_step: int
    state: dict[str, Array]
    """By name, [...state shape] each, in the graph's axes."""
    initial_state: str = ""
    """What the session began from, as its metadata has it."""


def snapshot_metadata(data: bytes) -> dict[str, str]:
    """What a snapshot says of itself.

    Raises:
        DamagedError: it is no snapshot.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > _MAX_HEADER_BYTES:
            raise DamagedError(f"its header has more than {_MAX_HEADER_BYTES} bytes")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise DamagedError(f"its format is {metadata['format']!r}, not {FORMAT!r}")
        for name in ("model_name", "model_version", "model_digest", "next_step", "crc32"):
            metadata[name]
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError("it is not a safetensors file with a session's metadata") from error


def decode_snapshot(model: StepModel, data: bytes) -> Snapshot:
    """What `encode_snapshot` gave; that its model is this one is for the caller to check.

    Raises:
        DamagedError: it is not what was written, or its names, shapes, or dtypes are not those of this model's state.
    """
    metadata = snapshot_metadata(data)
    try:
        tensors: dict[str, Any] = safetensors.numpy.load(data)
        next_step, checksum = int(metadata["next_step"]), int(metadata["crc32"], 16)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"it is not a whole safetensors file: {error}") from error
    if not 0 <= next_step <= MAX_IMPORTED_STEP:
        raise DamagedError(f"its step counter, {next_step}, is not from 0 to {MAX_IMPORTED_STEP}")
    begun_from = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(_INITIAL)}
    names = {spec.input_name for spec in model.spec.states}
    if set(tensors) != names:
        raise DamagedError(f"it has the tensors {sorted(tensors)}, the model {sorted(names)}")
    state = {}
    for spec in model.spec.states:
        name, array = spec.input_name, tensors[spec.input_name]
        dtype, shape = numpy_dtype(spec.dtype), api_shape(spec)
        if array.shape != shape or array.dtype != dtype:
            raise DamagedError(
                f"tensor {name!r} is {array.dtype} {list(array.shape)}, the model's {dtype} {list(shape)}"
            )
        state[name] = np.array(from_api(spec, array), order="C")
    ordered = {spec.input_name: tensors[spec.input_name] for spec in model.spec.states}
    if checksum != _state_checksum(ordered | begun_from, next_step):
        raise DamagedError("its checksum is wrong")
    initial_state = encode_initial_state({n.removeprefix(_INITIAL): value for n, value in begun_from.items()})
    decode_initial_state(initial_state, model)
    return Snapshot(metadata, next_step, state, initial_state)


def digest_of(inputs: Steps) -> str:
    """Tells the inputs of a request that failed from others."""
    return hashlib.sha256(inputs.tobytes()).hexdigest()


def _record_checksum(session_id: str, first_step: int, num_steps: int, where: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(f"{session_id} {first_step} {num_steps} ".encode() + where))


def _initial_tensors(initial_state: str) -> dict[str, Array]:
    if not initial_state:
        return {}
    values = safetensors.numpy.load(base64.b64decode(initial_state))
    return {f"{_INITIAL}{name}": values[name] for name in sorted(values)}


def _state_checksum(tensors: Mapping[str, Array], next_step: int) -> int:
    checksum = zlib.crc32(str(next_step).encode())
    for name, array in tensors.items():
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), checksum))
    return checksum
