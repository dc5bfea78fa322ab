"""A call that fails has an id: in its error details, in the log, and in the client's exception."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from structlog.testing import capture_logs

from ntm import AsyncClient, NotFoundError
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from server.rpc.failures import MAX_REQUEST_ID_CHARACTERS, request_id_of
from tests.server.helpers import Caller, Start, random_inputs

TRANSPORTS = ("native", "grpcio")


async def failure_of(call: Any) -> tuple[str, str]:
    """The reason and the request id of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    trailing = dict(caught.value.trailing_metadata() or ())
    for detail in status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details:
        detail.Unpack(info)
        detail.Unpack(request)
    return info.reason, request.request_id


def failing_step(session_id: str = "s") -> pb.StepRequest:
    """Which the model `fragile` fails on."""
    return pb.StepRequest(session_id=session_id, inputs=to_message(np.full((1, 3), 9, np.float32)))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_caller_that_names_its_call_finds_the_name_in_the_answer_and_in_the_log(
    serve: Start, models: Path, transport: str
) -> None:
    caller = Caller(*await serve(models, transport=transport))
    await caller.create("fragile")

    with capture_logs() as lines:
        call = caller.stub.Step(failing_step(), metadata=[("x-request-id", "order-7:retry.2")])
        reason, request_id = await failure_of(call)

    assert (reason, request_id) == ("STEP_FAILED", "order-7:retry.2")
    (told,) = [line for line in lines if line["event"] == "a call failed"]
    assert told["request_id"] == "order-7:retry.2"
    assert (told["rpc"], told["reason"], told["session_id"]) == ("Step", "STEP_FAILED", "s")
    await caller.channel.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_call_without_a_name_is_given_one_of_its_own(
    serve: Start, models: Path, transport: str
) -> None:
    caller = Caller(*await serve(models, transport=transport))
    await caller.create("fragile")

    ids = [(await failure_of(caller.stub.Step(failing_step())))[1] for _ in range(2)]
    ids += [(await failure_of(caller.stub.Step(failing_step("nobody"))))[1]]  # no plain case
    ids += [(await failure_of(caller.stub.GetSession(pb.GetSessionRequest(session_id="nobody"))))[1]]

    assert all(ids)
    assert len(set(ids)) == 4
    await caller.channel.close()


async def test_a_stream_that_fails_has_the_name_of_its_call(serve: Start, models: Path) -> None:
    caller = Caller(*await serve(models))
    stream = caller.stub.StreamSteps(
        iter([pb.StreamStepsRequest(step=failing_step("nobody"))]), metadata=[("x-request-id", "stream-1")]
    )

    assert await failure_of(stream.read()) == ("SESSION_NOT_FOUND", "stream-1")
    await caller.channel.close()


async def test_a_bug_is_logged_whole_under_the_name_that_its_caller_has(
    serve: Start, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = await serve(models)
    caller = Caller(server, address)
    monkeypatch.setattr(server.sessions, "get", lambda _: 1 / 0)

    with capture_logs() as lines:
        reason, request_id = await failure_of(caller.stub.GetSession(pb.GetSessionRequest(session_id="s")))

    (told,) = [line for line in lines if line["event"] == "a call failed unexpectedly"]
    assert reason == "BUG"
    assert told["request_id"] == request_id
    assert isinstance(told["exc_info"], ZeroDivisionError)
    await caller.channel.close()


async def test_what_its_caller_can_mend_is_no_line_of_the_log(serve: Start, models: Path) -> None:
    caller = Caller(*await serve(models))

    with capture_logs() as lines:
        await failure_of(caller.stub.Step(failing_step("nobody")))

    assert not lines
    await caller.channel.close()


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["not usable"],
        [""],
        ["x" * (MAX_REQUEST_ID_CHARACTERS + 1)],
        ["line\nbreak"],
        ["ü"],
        [b"bytes"],
        ["one", "two"],
    ],
)
def test_an_id_that_cannot_be_used_is_replaced(given: list[str | bytes]) -> None:
    made = request_id_of([("x-request-id", value) for value in given])

    assert made not in given
    assert len(made) == 16


@pytest.mark.parametrize("given", ["a", "x" * MAX_REQUEST_ID_CHARACTERS, "0af7651916cd43dd-8448/1:2@h+=_."])
def test_an_id_that_can_be_used_is_taken_over(given: str) -> None:
    assert request_id_of([("other", "y"), ("x-request-id", given)]) == given


async def test_the_clients_exception_shows_the_name(serve: Start, models: Path) -> None:
    _, address = await serve(models)

    async with AsyncClient(address) as client:
        with pytest.raises(NotFoundError) as caught:
            await client.attach("nobody")

    error = caught.value
    assert len(error.request_id) == 16
    assert error.request_id in str(error)
    assert "request_id" not in error.metadata


async def test_sessions_that_fail_in_a_batch_have_the_name_of_the_batch(serve: Start, models: Path) -> None:
    _, address = await serve(models)

    with capture_logs() as lines:
        async with AsyncClient(address) as client:
            sessions = [await client.session("fragile") for _ in range(3)]
            inputs = np.zeros((3, 1, 3), np.float32)
            inputs[:2] = 9
            result = await client.batch_step(sessions, inputs)

    told = [line for line in lines if line["event"] == "a call failed"]
    assert [*result.errors] == [0, 1]
    (name,) = {error.request_id for error in result.errors.values()}
    assert [(line["request_id"], line["index"], line["session_id"]) for line in told] == [
        (name, index, sessions[index].session_id) for index in (0, 1)
    ]


def samples(server: Any) -> dict[tuple[str, ...], float]:
    """What the registry tells, by name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in server.metrics.registry.collect()
        for sample in metric.samples
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_refusals_are_counted_by_their_reason(serve: Start, models: Path, transport: str) -> None:
    server, address = await serve(models, transport=transport)
    caller = Caller(server, address)
    await caller.create("fragile")
    calls: Iterable[Callable[[], Any]] = (
        lambda: caller.stub.Step(failing_step()),
        lambda: caller.stub.Step(failing_step("nobody")),
        lambda: caller.stub.Step(pb.StepRequest(session_id="s", inputs=to_message(random_inputs(1)[:, :2]))),
        lambda: caller.stub.BatchStep(
            pb.BatchStepRequest(
                session_ids=["s", "nobody"], inputs=to_message(np.zeros((2, 1, 3), np.float32))
            )
        ),
    )

    for call in calls:
        try:
            await call()
        except grpc.aio.AioRpcError:
            continue

    told = samples(server)
    assert told["ntm_refusals_total", "STEP_FAILED"] == 1
    assert told["ntm_refusals_total", "SESSION_NOT_FOUND"] == 2  # a call, and a session of a batch
    assert told["ntm_refusals_total", "INVALID_INPUT"] == 1
    await caller.channel.close()
