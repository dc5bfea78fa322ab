"""What a store keeps of a session, as bytes: it comes back as it was, and damage is noticed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.model.layout import Steps
from server.model.spec import StepModel, load
from server.runtime.provider import choose
from server.storage.codec import (
    DamagedError,
    Failure,
    RecordedSteps,
    SessionMetadata,
    check_unbroken,
    decode_record,
    decode_snapshot,
    encode_record,
    encode_snapshot,
    fingerprint,
)
from server.storage.interface import Record
from tests import step_models
from tests.server.helpers import random_inputs

HERE = b"12345678"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StepModel:
    """A model whose state has every layout there is."""
    root = tmp_path_factory.mktemp("models")
    step_models.write(root, step_models.many_layouts(), "m")
    return load(root / "m" / "1" / "model.onnx", "m", 1)


@pytest.fixture
def state(model: StepModel) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        spec.input_name: np.asarray(generator.integers(-99, 99, tuple(spec.shape))).astype(
            np.int64 if spec.input_name == "count" else np.float32
        )
        for spec in model.spec.states
    }


def inputs_of(model: StepModel, num_steps: int) -> Steps:
    return model.inputs.pack({model.inputs.names[0]: random_inputs(num_steps)})


def outputs_of(model: StepModel, num_steps: int) -> Steps:
    return model.outputs.pack({model.outputs.names[0]: random_inputs(num_steps, 1)})


def test_an_entry_comes_back_as_it_was() -> None:
    metadata = SessionMetadata(
        "asked", 3, "d" * 64, 12.5, 7, 99, (1, 7), "here", True, 2, Failure(7, "ab", "STEP_FAILED", -1)
    )

    assert SessionMetadata.decode(metadata.encode()) == metadata
    assert SessionMetadata.decode(SessionMetadata("", 1, "", 0.0, 0).encode()).failure is None


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_an_entry_is_noticed(position: int, bit: int) -> None:
    content = bytearray(SessionMetadata("asked", 3, "d" * 64, 12.5, 7, 99, (1, 7), "here").encode())
    content[position % len(content)] ^= 1 << bit

    with pytest.raises(DamagedError):
        SessionMetadata.decode(bytes(content))


def test_a_record_comes_back_as_it_was(model: StepModel) -> None:
    inputs, outputs = inputs_of(model, 4), outputs_of(model, 4)

    ran = decode_record("s", encode_record("s", 9, inputs, outputs, HERE), model)

    assert (ran.first_step, ran.end_step, ran.fingerprint) == (9, 13, HERE)
    np.testing.assert_array_equal(ran.inputs, inputs)
    np.testing.assert_array_equal(ran.outputs, outputs)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_record_is_noticed(model: StepModel, position: int, bit: int) -> None:
    content = bytearray(encode_record("s", 9, inputs_of(model, 4), outputs_of(model, 4), HERE).content)
    content[position % len(content)] ^= 1 << bit

    with pytest.raises(DamagedError):
        decode_record("s", Record(9, bytes(content)), model)


@pytest.mark.parametrize("cut", [0, 5, 23, 24, 100])
def test_a_record_that_is_cut_short_is_noticed(model: StepModel, cut: int) -> None:
    content = encode_record("s", 9, inputs_of(model, 4), outputs_of(model, 4), HERE).content

    with pytest.raises(DamagedError):
        decode_record("s", Record(9, content[:cut]), model)


def test_a_record_in_the_place_of_another_is_noticed(model: StepModel) -> None:
    record = encode_record("s", 9, inputs_of(model, 4), outputs_of(model, 4), HERE)

    with pytest.raises(DamagedError):
        decode_record("another", record, model)
    with pytest.raises(DamagedError):
        decode_record("s", Record(8, record.content), model)


def test_records_must_lead_from_the_snapshot_to_the_counter() -> None:
    def ran(first_step: int, num_steps: int) -> RecordedSteps:
        return RecordedSteps(first_step, np.zeros(num_steps, "V4"), np.zeros(num_steps, "V4"), HERE)

    check_unbroken([], 4, 4)
    check_unbroken([ran(0, 4), ran(4, 2)], 4, 6)
    check_unbroken([ran(0, 4), ran(4, 2)], 0, 6)
    check_unbroken([ran(0, 4), ran(4, 2)], 6, 6)
    for messages, snapshot_step, next_step in (
        ([], 4, 5),
        ([ran(0, 4), ran(5, 1)], 4, 6),
        ([ran(0, 4), ran(4, 2)], 4, 7),
        ([ran(0, 4), ran(4, 2)], 3, 6),
        ([ran(4, 2)], 3, 6),
    ):
        with pytest.raises(DamagedError):
            check_unbroken(messages, snapshot_step, next_step)


def test_a_snapshot_comes_back_as_it_was(model: StepModel, state: dict[str, np.ndarray]) -> None:
    snapshot = decode_snapshot(model, encode_snapshot(model, 5, state))

    assert snapshot.next_step == 5
    assert snapshot.metadata["model_digest"] == model.digest
    for name, array in state.items():
        assert snapshot.state[name].dtype == array.dtype
        np.testing.assert_array_equal(snapshot.state[name], array)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_snapshots_tensors_is_noticed(model: StepModel, position: int, bit: int) -> None:
    state = {spec.input_name: np.zeros(tuple(spec.shape)) for spec in model.spec.states}
    state = {n: a.astype(np.int64 if n == "count" else np.float32) for n, a in state.items()}
    whole = encode_snapshot(model, 5, state)
    first = 8 + int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole)
    damaged[first + position % (len(whole) - first)] ^= 1 << bit

    with pytest.raises(DamagedError):
        decode_snapshot(model, bytes(damaged))


def test_a_snapshot_cut_anywhere_is_noticed(model: StepModel, state: dict[str, np.ndarray]) -> None:
    whole = encode_snapshot(model, 5, state)

    for length in range(0, len(whole), 7):
        with pytest.raises(DamagedError):
            decode_snapshot(model, whole[:length])


def test_the_fingerprint_tells_machines_and_models_apart(
    model: StepModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = choose("cpu", 0)
    here = fingerprint(model, device, None)
    step_models.write(tmp_path, step_models.accumulator(), "a")
    other_model = load(tmp_path / "a" / "1" / "model.onnx", "a", 1)

    assert fingerprint(model, device, None) == here
    assert fingerprint(other_model, device, None).digest != here.digest
    assert fingerprint(model, device, 8).digest != here.digest
    monkeypatch.setattr("server.runtime.provider._cpu", lambda: "another processor")
    assert fingerprint(model, choose("cpu", 0), None).digest != here.digest


@pytest.mark.parametrize(
    "change",
    [
        {"next": 1},
        {"model_digest": None},
        {"model_version": "1"},
        {"snapshot_step": 1e39},
        {"reset_steps": 3},
        {"failure": {"first_step": 1}},
        {"end_reason": "LOST"},
        {"create_time_s": float("nan")},
    ],
)
def test_an_entry_whose_checksum_is_right_and_whose_fields_are_others_is_damage(
    change: dict[str, object],
) -> None:
    fields = json.loads(SessionMetadata("r", 1, "d", 1.0, 5, reset_steps=(1, 2)).encode()[8:])
    text = json.dumps(
        {name: value for name, value in (fields | change).items() if value is not None}
    ).encode()

    with pytest.raises(DamagedError):
        SessionMetadata.decode(b"%08x" % zlib.crc32(text) + text)


@pytest.mark.parametrize("text", [b"", b"3", b'"a"', b"[]", b"{", b"\xff", b"[" * 100_000])
def test_an_entry_whose_checksum_is_right_and_that_is_no_metadata_is_damage(text: bytes) -> None:
    with pytest.raises(DamagedError):
        SessionMetadata.decode(b"%08x" % zlib.crc32(text) + text)
