"""Watching a session: what was committed, in order, to whoever keeps up; the session is as if nobody looked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from ntm import AsyncClient, Client, NotFoundError, UnavailableError, Watched
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from server.errors import SessionNotFoundError
from server.sessions.watching import MOST_FRAMES, Frame, Watcher
from tests import step_models
from tests.conftest import ServerProcess
from tests.server.helpers import Caller, Start, accumulated, random_inputs, refused

INVALID, GONE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


async def watching(client: AsyncClient, *names: str) -> tuple[object, Watched]:
    """A watch of session "s" that has begun, and its first answer."""
    session = await client.attach("s")
    watch = session.watch(*names)
    return watch, await anext(watch)


async def test_a_watcher_is_told_each_message_with_the_state_after_it(caller: Caller) -> None:
    await caller.create("accumulator")
    inputs = random_inputs(12)
    await caller.step(inputs[:3])
    async with AsyncClient(caller.address) as client:
        watch, first = await watching(client, "sum")
        for start, end in [(3, 4), (4, 9), (9, 12)]:
            await caller.step(inputs[start:end])
        told = [await anext(watch) for _ in range(3)]
        await watch.aclose()

    expected = accumulated(inputs)
    assert (first.first_step, first.next_step, first.inputs) == (3, 3, None)
    np.testing.assert_array_equal(first.state["sum"], expected[2])
    assert [(one.first_step, one.next_step, one.num_lost_messages) for one in told] == [
        (3, 4, 0),
        (4, 9, 0),
        (9, 12, 0),
    ]
    np.testing.assert_array_equal(np.concatenate([one.inputs for one in told]), inputs[3:])
    np.testing.assert_array_equal(np.concatenate([one.outputs for one in told]), expected[3:])
    for one in told:
        np.testing.assert_array_equal(one.state["sum"], expected[one.next_step - 1])


async def test_steps_of_batches_and_of_calls_together_are_told_to_the_right_watcher(
    roomy_caller: Caller,
) -> None:
    caller, inputs = roomy_caller, random_inputs(4)
    ids = [f"s{i}" for i in range(6)]
    for i in ids:
        await caller.create("accumulator", i)
    async with AsyncClient(caller.address) as client:
        session = await client.attach("s2")
        watch = session.watch("sum")
        await anext(watch)
        request = pb.BatchStepRequest(
            session_ids=ids, inputs=to_message(np.stack([inputs * i for i in range(6)]))
        )
        await caller.stub.BatchStep(request)
        batch = await anext(watch)
        with caller.hold("accumulator"):
            calls = [
                asyncio.ensure_future(caller.step(inputs * i, session_id)) for i, session_id in enumerate(ids)
            ]
            await asyncio.sleep(0.05)
        await asyncio.gather(*calls)
        together = await anext(watch)
        await watch.aclose()

    expected = accumulated(np.concatenate([inputs * 2, inputs * 2]))
    for one, part in ((batch, slice(0, 4)), (together, slice(4, 8))):
        np.testing.assert_array_equal(one.inputs, inputs * 2)
        np.testing.assert_array_equal(one.outputs, expected[part])
        np.testing.assert_array_equal(one.state["sum"], expected[part.stop - 1])


async def test_a_reset_is_told_and_a_repeat_or_a_failed_message_is_not(caller: Caller) -> None:
    await caller.create("logarithm")
    async with AsyncClient(caller.address) as client:
        watch, _ = await watching(client)
        ones = np.ones((2, 3), np.float32)
        await caller.step(ones, first_step=0)
        await caller.step(ones, first_step=0)
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.step(ones * -100)
        await caller.stub.ResetSession(pb.ResetSessionRequest(session_id="s"))
        await caller.step(ones)
        told = [await anext(watch) for _ in range(3)]
        await watch.aclose()

    assert [(one.first_step, one.next_step, one.is_reset) for one in told] == [
        (0, 2, False),
        (2, 2, True),
        (2, 4, False),
    ]
    assert all(one.state == {} for one in told)


async def test_a_watch_ends_with_its_session(caller: Caller) -> None:
    await caller.create("accumulator")
    async with AsyncClient(caller.address) as client:
        watch, _ = await watching(client, "sum")
        await caller.step(random_inputs(1))
        await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))

        assert (await anext(watch)).next_step == 1
        with pytest.raises(NotFoundError):
            await anext(watch)
    assert caller.server.sessions.watching.of == {}


async def test_a_watcher_who_leaves_is_forgotten(caller: Caller) -> None:
    await caller.create("accumulator")
    async with AsyncClient(caller.address) as client:
        watches = [(await watching(client, "sum"))[0] for _ in range(3)]
        assert len(caller.server.sessions.watching.of["s"]) == 3
        for watch in watches:
            await watch.aclose()
        while caller.server.sessions.watching.of:
            await asyncio.sleep(0.01)


async def test_what_cannot_be_watched_is_refused(caller: Caller) -> None:
    await caller.create("accumulator")

    for session_id, names, code, reason in [
        ("s", ["nothing"], INVALID, "INVALID_INPUT"),
        ("t", [], GONE, "SESSION_NOT_FOUND"),
        ("!", [], INVALID, "INVALID_INPUT"),
    ]:
        call = caller.stub.WatchSession(pb.WatchSessionRequest(session_id=session_id, include_state=names))
        await refused(anext(aiter(call)), code, reason)


async def test_a_server_that_stops_does_not_wait_for_watchers(serve: Start, models: Path) -> None:
    server, address = await serve(models, drain_timeout_s=30)
    async with AsyncClient(address, retry_for_s=0) as client, AsyncClient(address) as other:
        session = await client.session("accumulator", session_id="s")
        watch, _ = await watching(other)
        await asyncio.wait_for(server.stop(), 10)
        with pytest.raises(UnavailableError):
            await anext(watch)
        assert session.next_step == 0


def test_the_synchronous_client_watches_too(start_server: Callable[..., ServerProcess], models: Path) -> None:
    with Client(start_server(models).address) as client, client.session("accumulator") as session:
        watch = session.watch("sum")
        assert next(watch).next_step == 0
        outputs = session.run(random_inputs(3))
        told = next(watch)
        watch.close()

    np.testing.assert_array_equal(told.outputs, outputs)
    np.testing.assert_array_equal(told.state["sum"], outputs[-1])


async def test_ten_watchers_that_do_not_read_hold_nothing_up_and_change_no_bit(
    serve: Start, tmp_path: Path
) -> None:
    step_models.write(tmp_path / "models", step_models.accumulator(), "accumulator")
    server, address = await serve(tmp_path / "models")
    caller = Caller(server, address)
    await caller.create("accumulator")
    inputs = random_inputs(1000)
    calls = [
        caller.stub.WatchSession(pb.WatchSessionRequest(session_id="s", include_state=["sum"]))
        for _ in range(10)
    ]
    for call in calls:
        await anext(aiter(call))

    outputs = [await caller.step(inputs[i : i + 100]) for i in range(0, 1000, 100)]

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))
    for call in calls:
        call.cancel()
    await caller.channel.close()


def frame(step: int, state: bool = True) -> Frame:
    array = np.zeros((1, 3), np.float32)
    return Frame(step, array, array, step + 1, {"sum": array} if state else {})


async def test_a_slow_watcher_loses_messages_and_is_told_how_many() -> None:
    watcher = Watcher(wants_state=True)

    for step in range(MOST_FRAMES + 5):
        watcher.offer(frame(step))
    assert not watcher.has_room
    told = [await watcher.next() for _ in range(MOST_FRAMES)]
    watcher.offer(frame(100))
    watcher.offer(frame(101, state=False))  # it was not read, since nobody had room when its message began
    watcher.offer(frame(102))

    assert [(one.first_step, lost) for one, lost in told] == [(step, 0) for step in range(MOST_FRAMES)]
    assert [((one := await watcher.next())[0].first_step, one[1]) for _ in range(2)] == [(100, 5), (102, 1)]
    watcher.end(SessionNotFoundError("s"))
    with pytest.raises(SessionNotFoundError):
        await watcher.next()


async def test_large_messages_are_lost_sooner_but_one_always_fits() -> None:
    watcher = Watcher(wants_state=False)
    large = np.zeros(6 * 2**20, np.uint8)

    for step in range(4):
        watcher.offer(Frame(step, large, large[:1], step + 1, {}))

    assert [(await watcher.next())[0].first_step for _ in range(2)] == [0, 1]
    watcher.offer(Frame(9, large, large, 10, {}))
    assert (await watcher.next())[1] == 2
