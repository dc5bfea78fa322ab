"""More sessions than slots: those unused longest wait in the store, and come back when they are called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from tests.server.helpers import (
    EXHAUSTED,
    GONE,
    Caller,
    Start,
    accumulated,
    pending,
    random_inputs,
    refused,
)


@pytest_asyncio.fixture
async def caller(serve: Start, models: Path, tmp_path: Path) -> AsyncIterator[Caller]:
    """A server with room for three sessions of each model."""
    server, address = await serve(
        models,
        store=f"sqlite:///{tmp_path}/sessions.sqlite3",
        max_resident_sessions=3,
        max_batch_size=4,
        max_pending_messages=300,
    )
    caller = Caller(server, address)
    yield caller
    await caller.channel.close()


async def test_many_sessions_on_few_slots_give_what_each_would_alone(caller: Caller) -> None:
    inputs = {f"s{index}": random_inputs(6, index) for index in range(40)}
    for session_id in inputs:
        await caller.create("accumulator", session_id)

    async def run(session_id: str) -> np.ndarray:
        steps = [
            await caller.step(inputs[session_id][i : i + 2], session_id, first_step=i) for i in (0, 2, 4)
        ]
        return np.concatenate(steps)

    for outputs, of_session in zip(await asyncio.gather(*map(run, inputs)), inputs.values(), strict=True):
        np.testing.assert_array_equal(outputs, accumulated(of_session))
    served = caller.server.sessions.models.find("accumulator", None)
    assert served.num_sessions == len(caller.server.sessions.in_memory) == 3
    assert served.num_pending == 0
    assert served.slots.num_used <= 3


async def test_a_batch_of_more_sessions_than_slots_is_served_whole(caller: Caller) -> None:
    inputs = np.stack([random_inputs(3, index) for index in range(10)])
    ids = [f"s{index}" for index in range(10)]
    for session_id in ids:
        await caller.create("accumulator", session_id)

    request = pb.BatchStepRequest(session_ids=ids, inputs=to_message(inputs), first_steps=[0] * 10)
    answer = await caller.stub.BatchStep(request)

    assert not answer.errors
    for outputs, of_session in zip(to_array(answer.outputs), inputs, strict=True):
        np.testing.assert_array_equal(outputs, accumulated(of_session))


async def test_the_session_unused_longest_goes_out(caller: Caller) -> None:
    for session_id in "abc":
        await caller.create("accumulator", session_id)
        await caller.step(random_inputs(1), session_id)
    await caller.step(random_inputs(1), "a")

    await caller.create("accumulator", "d")
    await caller.step(random_inputs(1), "d")

    assert set(caller.server.sessions.in_memory) == {"a", "c", "d"}


async def test_a_session_with_work_in_line_never_goes_out(caller: Caller) -> None:
    inputs = random_inputs(4)
    for session_id in "abcd":
        await caller.create("accumulator", session_id)
    with caller.hold("accumulator"):
        busy = [asyncio.ensure_future(caller.step(inputs, session_id)) for session_id in "abc"]
        await pending(caller, "accumulator", 3)
        other = asyncio.ensure_future(caller.step(inputs, "d"))
        served = caller.server.sessions.models.find("accumulator", None)
        while not served.table.num_waiting:
            await asyncio.sleep(0)
        assert set(caller.server.sessions.in_memory) == {"a", "b", "c"}

    for step in (*busy, other):
        np.testing.assert_array_equal(await step, accumulated(inputs))


async def test_calls_that_come_while_a_session_goes_out_are_served(caller: Caller) -> None:
    inputs = random_inputs(60)
    for session_id in "abcd":
        await caller.create("accumulator", session_id)

    async def run(session_id: str) -> np.ndarray:
        return np.concatenate(
            [await caller.step(inputs[i : i + 1], session_id, first_step=i) for i in range(60)]
        )

    for outputs in await asyncio.gather(*map(run, "abcd")):
        np.testing.assert_array_equal(outputs, accumulated(inputs))


async def test_those_who_wait_for_room_are_not_without_number(
    serve: Start, models: Path, tmp_path: Path
) -> None:
    server, address = await serve(
        models,
        store=f"sqlite:///{tmp_path}/few.sqlite3",
        max_resident_sessions=1,
        max_batch_size=1,
        max_pending_messages=2,
    )
    caller = Caller(server, address)
    for session_id in "abcd":
        await caller.create("accumulator", session_id)
    with caller.hold("accumulator"):
        steps = [asyncio.ensure_future(caller.step(random_inputs(1), "a"))]
        await pending(caller, "accumulator", 1)
        for count, session_id in enumerate("bc"):
            steps.append(asyncio.ensure_future(caller.step(random_inputs(1), session_id)))
            while server.sessions.models.find("accumulator", None).table.num_waiting != count + 1:
                await asyncio.sleep(0)
        await refused(caller.step(random_inputs(1), "d"), EXHAUSTED, "QUEUE_FULL")

    await asyncio.gather(*steps)
    await caller.channel.close()


async def test_a_session_in_the_store_is_listed_described_reset_forked_and_deleted(caller: Caller) -> None:
    inputs = random_inputs(4)
    for session_id in "abcdef":
        await caller.create("accumulator", session_id)
        await caller.step(inputs[:3], session_id)
    assert set(caller.server.sessions.in_memory) == {"d", "e", "f"}

    listed = (await caller.stub.ListSessions(pb.ListSessionsRequest())).sessions
    assert [(session.session_id, session.next_step) for session in listed] == [(i, 3) for i in "abcdef"]
    await caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="a", session_id="copy"))
    await caller.stub.ResetSession(pb.ResetSessionRequest(session_id="b", at_step=3))
    await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="c"))

    np.testing.assert_array_equal(await caller.step(inputs[3:], "copy"), accumulated(inputs)[3:])
    np.testing.assert_array_equal(await caller.step(inputs, "b", first_step=3), accumulated(inputs))
    await refused(caller.step(inputs, "c"), GONE, "SESSION_NOT_FOUND")


async def test_a_call_that_gives_up_waiting_for_room_leaves_no_trace(caller: Caller) -> None:
    inputs = random_inputs(4)
    for session_id in "abcd":
        await caller.create("accumulator", session_id)
    with caller.hold("accumulator"):
        busy = [asyncio.ensure_future(caller.step(inputs, session_id)) for session_id in "abc"]
        await pending(caller, "accumulator", 3)
        request = pb.StepRequest(session_id="d", inputs=to_message(inputs), first_step=0)
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.stub.Step(request, timeout=0.2)
    await asyncio.gather(*busy)

    assert await caller.next_step("d") == 0
    np.testing.assert_array_equal(await caller.step(inputs, "d", first_step=0), accumulated(inputs))
