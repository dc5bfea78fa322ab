"""ExportSession and ImportSession: a session's whole state, taken out and put back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ntm.v1 import session_service_pb2 as pb
from tests.server.helpers import INVALID, ORDER, TAKEN, Caller, accumulated, random_inputs, refused


async def exported(caller: Caller, session_id: str = "s") -> bytes:
    return (await caller.stub.ExportSession(pb.ExportSessionRequest(session_id=session_id))).snapshot


async def put_back(caller: Caller, snapshot: bytes, session_id: str = "copy", **fields: Any) -> Any:
    request = pb.ImportSessionRequest(snapshot=snapshot, session_id=session_id, **fields)
    return (await caller.stub.ImportSession(request)).session


def with_metadata(snapshot: bytes, **changes: str) -> bytes:
    """A snapshot that says something else of itself."""
    length = int.from_bytes(snapshot[:8], "little")
    metadata = json.loads(snapshot[8 : 8 + length])["__metadata__"]
    return safetensors.numpy.save(safetensors.numpy.load(snapshot), {**metadata, **changes})


async def test_an_imported_session_goes_on_as_the_exported_one_would(caller: Caller) -> None:
    inputs = random_inputs(6)
    await caller.create("accumulator")
    await caller.step(inputs[:4])

    session = await put_back(caller, await exported(caller))

    assert (session.session_id, session.model_name, session.next_step) == ("copy", "accumulator", 4)
    np.testing.assert_array_equal(await caller.step(inputs[4:], "copy"), accumulated(inputs)[4:])
    np.testing.assert_array_equal(await caller.step(inputs[4:]), accumulated(inputs)[4:])


async def test_an_export_is_a_safetensors_file_in_the_apis_axes(caller: Caller) -> None:
    await caller.create("many_layouts")
    await caller.step(random_inputs(2))
    shown = await caller.state()

    tensors = safetensors.numpy.load(await exported(caller))

    assert tensors.keys() == shown.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, shown[name])
    await put_back(caller, await exported(caller))
    for name, array in (await caller.state("copy")).items():
        np.testing.assert_array_equal(array, shown[name])


async def test_a_repeated_import_gives_the_same_session_and_another_request_is_refused(
    caller: Caller,
) -> None:
    await caller.create("accumulator")
    await caller.step(random_inputs(2))
    snapshot = await exported(caller)

    first = await put_back(caller, snapshot, request_id="r")
    await caller.step(random_inputs(1), "copy")
    second = await put_back(caller, snapshot, request_id="r")

    assert (first.session_id, first.next_step, second.next_step) == ("copy", 2, 3)
    await refused(put_back(caller, snapshot, "other", request_id="r"), TAKEN, "REQUEST_ID_REUSED")
    await refused(put_back(caller, snapshot), TAKEN, "SESSION_EXISTS")


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: b"",
        lambda s: b"not a safetensors file at all",
        lambda s: s[:-1],
        lambda s: s + b"x",
        lambda s: s[:-1] + bytes([s[-1] ^ 1]),
        lambda s: safetensors.numpy.save(safetensors.numpy.load(s)),
        lambda s: with_metadata(s, next_step="5"),
        lambda s: with_metadata(s, next_step="-1"),
        lambda s: with_metadata(s, model_version="one"),
        lambda s: with_metadata(s, format="another"),
    ],
)
async def test_a_damaged_snapshot_is_refused_and_makes_nothing(caller: Caller, damage: Any) -> None:
    await caller.create("accumulator")
    await caller.step(random_inputs(2))

    told = await refused(put_back(caller, damage(await exported(caller))), INVALID, "INVALID_INPUT")

    assert told["field"] == "snapshot"
    assert [s.session_id for s in (await caller.stub.ListSessions(pb.ListSessionsRequest())).sessions] == [
        "s"
    ]


async def test_a_snapshot_of_another_model_file_is_refused(caller: Caller) -> None:
    await caller.create("accumulator")

    snapshot = with_metadata(await exported(caller), model_digest="0" * 64)

    await refused(put_back(caller, snapshot), ORDER, "MODEL_MISMATCH")


async def test_a_snapshot_with_the_tensors_of_another_model_is_refused(caller: Caller) -> None:
    await caller.create("accumulator")
    await caller.create("delay_line", "d")
    length = int.from_bytes((s := await exported(caller))[:8], "little")
    metadata = json.loads(s[8 : 8 + length])["__metadata__"]

    mixed = safetensors.numpy.save(safetensors.numpy.load(await exported(caller, "d")), metadata)

    await refused(put_back(caller, mixed), INVALID, "INVALID_INPUT")


async def test_a_snapshot_with_values_that_are_not_finite_is_refused(caller: Caller) -> None:
    from server.storage.codec import encode_snapshot

    await caller.create("accumulator")
    model = caller.server.sessions.models.find("accumulator", None).model
    state = {"sum": np.array([1, np.nan, 2], np.float32)}

    await refused(put_back(caller, encode_snapshot(model, 3, state)), INVALID, "INVALID_INPUT")
