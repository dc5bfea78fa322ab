"""Quotas of principals, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from ntm import AsyncClient, UnauthenticatedError
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from server.security.tokens import line_of
from tests.server.helpers import EXHAUSTED, Start, accumulated, pending, random_inputs, refused
from tests.server.rpc.test_ownership import Principal


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{line_of('alice', 'a')}\n{line_of('bob', 'b')}")
    return {"tokens": tokens, "store": f"sqlite:///{tmp_path}/data/sessions.sqlite3"}


def retry_after_s(error: grpc.aio.AioRpcError) -> float:
    trailing = dict(error.trailing_metadata() or ())
    _, _, retry = status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details
    told = error_details_pb2.RetryInfo()
    assert retry.Unpack(told)
    return told.retry_delay.ToTimedelta().total_seconds()


async def test_a_principal_has_as_many_sessions_as_its_quota_and_others_are_not_touched(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings, max_sessions_per_principal=2)
    alice, bob = Principal(address, "a"), Principal(address, "b")
    await alice.create("one", request_id="first")
    await alice.create("two")

    await refused(alice.create("three"), EXHAUSTED, "QUOTA_EXCEEDED")
    fork = pb.ForkSessionRequest(source_session_id="one", session_id="fork")
    await refused(alice.call["ForkSession"](fork), EXHAUSTED, "QUOTA_EXCEEDED")
    snapshot = (await alice.call["ExportSession"](pb.ExportSessionRequest(session_id="one"))).snapshot
    imported = pb.ImportSessionRequest(snapshot=snapshot)
    await refused(alice.call["ImportSession"](imported), EXHAUSTED, "QUOTA_EXCEEDED")
    assert (await alice.create("one", request_id="first")).session_id == "one"  # a repeat makes nothing
    await bob.create("one")
    await alice.delete("two")
    await alice.create("three")


async def test_what_a_principals_sessions_can_take_in_the_store_is_bounded(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings, max_stored_mib_per_principal=1)
    alice = Principal(address, "a")

    outcomes = await asyncio.gather(*(alice.create(str(n)) for n in range(50)), return_exceptions=True)

    refused_ones = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert {each.code() for each in refused_ones} == {EXHAUSTED}
    assert "MiB" in str(refused_ones[0].details())
    assert 1 < len(await alice.ids()) == 50 - len(refused_ones) < 40


async def test_steps_over_the_rate_are_refused_with_the_time_to_come_again(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings, max_steps_per_s_per_principal=10)
    alice, bob = Principal(address, "a"), Principal(address, "b")
    await alice.create("s")
    await bob.create("s")
    await alice.step("s", random_inputs(40))

    with pytest.raises(grpc.aio.AioRpcError) as refused_call:
        await alice.step("s", random_inputs(1))
    assert refused_call.value.code() == EXHAUSTED
    assert 1.0 < retry_after_s(refused_call.value) < 3.1
    batch = pb.BatchStepRequest(session_ids=["s"], inputs=to_message(random_inputs(1)[np.newaxis]))
    await refused(alice.call["BatchStep"](batch), EXHAUSTED, "QUOTA_EXCEEDED")
    assert "QUOTA_EXCEEDED" in await alice.try_out("StreamSteps", "s")
    await bob.step("s", random_inputs(40))


async def test_steps_that_wait_are_bounded_and_count_no_more_when_their_caller_leaves(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    server, address = await serve(models, **settings, max_queued_steps_per_principal=8)
    alice, bob = Principal(address, "a"), Principal(address, "b")
    for number in range(3):
        await alice.create(str(number))
    await bob.create("s")
    with server.sessions.models.find("accumulator", None).engine.device_held():
        waiting = [
            alice.call["Step"](pb.StepRequest(session_id=str(number), inputs=to_message(random_inputs(4))))
            for number in range(2)
        ]
        for call in waiting:
            call.add_done_callback(lambda _: None)
        await pending(_counting(server), "accumulator", 2)

        await refused(alice.step("2", random_inputs(1)), EXHAUSTED, "QUOTA_EXCEEDED")
        for call in waiting:
            call.cancel()
        while server.access._quotas._account("alice").num_queued:
            await _turn()
    await alice.step("2", random_inputs(8))
    with pytest.raises(grpc.aio.AioRpcError, match="9"):
        await alice.step("2", random_inputs(9))
    await bob.step("s", random_inputs(8))


async def test_the_client_waits_as_long_as_it_is_told_and_gets_its_steps(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings, max_steps_per_s_per_principal=200)
    inputs = random_inputs(400)

    async with AsyncClient(address, token="a") as client:
        session = await client.session("accumulator")
        outputs = [await session.run(inputs[start : start + 100]) for start in range(0, 400, 100)]

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


async def test_a_client_without_a_token_is_told_so_by_a_type_of_its_own(
    serve: Start, models: Path, settings: dict[str, Any]
) -> None:
    _, address = await serve(models, **settings)

    async with AsyncClient(address) as client:
        with pytest.raises(UnauthenticatedError, match="token"):
            await client.models()


def _counting(server: Any) -> Any:
    class Caller:
        pass

    caller = Caller()
    caller.server = server  # type: ignore[attr-defined]
    return caller


async def _turn() -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize("ends", ["it fails", "its caller leaves"])
async def test_what_a_stream_has_sent_ahead_counts_no_more_when_it_has_ended(
    serve: Start, models: Path, settings: dict[str, Any], ends: str
) -> None:
    server, address = await serve(models, **settings, max_queued_steps_per_principal=4)
    alice = Principal(address, "a")
    await alice.create("s")
    served = server.sessions.models.find("accumulator", None)
    first_step = 7 if ends == "it fails" else None
    stub: Any = session_service_pb2_grpc.SessionServiceStub(alice.channel)  # type: ignore[no-untyped-call]

    for _ in range(3):  # what is left of one would keep the next out
        stream = stub.StreamSteps(metadata=[("authorization", "Bearer a")])
        with served.engine.device_held():
            for _ in range(3):
                step = pb.StepRequest(
                    session_id="s", inputs=to_message(random_inputs(1)), first_step=first_step
                )
                with contextlib.suppress(grpc.aio.AioRpcError):  # one that has failed takes no more
                    await stream.write(pb.StreamStepsRequest(step=step))
            if ends == "its caller leaves":
                await pending_or_ended(served)
                stream.cancel()
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await stream.read()
        while served.num_pending:
            await asyncio.sleep(0.01)

    step = pb.StepRequest(session_id="s", inputs=to_message(random_inputs(4)))
    await alice.call["Step"](step)


async def pending_or_ended(served: Any) -> None:
    """Wait until three messages wait."""
    while served.num_pending < 3:
        await asyncio.sleep(0.01)
