"""Sessions that outlive their server: after a clean stop, and after one that was not."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import tensor_pb2
from server.storage.codec import SessionMetadata, encode_initial_state
from tests.server.helpers import GONE, ORDER, TAKEN, Caller, Start, accumulated, crash, random_inputs, refused
from tests.step_models import WIDTH

Restart = Callable[..., Awaitable[Caller]]


@pytest_asyncio.fixture
async def restart(serve: Start, models: Path, tmp_path: Path) -> AsyncIterator[Restart]:
    """Start a server on the store, after ending the one before: by a clean stop, or by a crash."""
    callers: list[Caller] = []

    async def again(by_crash: bool = True, **settings: Any) -> Caller:
        if callers:
            await callers[-1].channel.close()
            await (crash(callers[-1].server) if by_crash else callers[-1].server.stop())
        settings = {"snapshot_every_steps": 6, "max_batch_size": 4, **settings}
        settings = {"store": f"sqlite:///{tmp_path}/sessions.sqlite3", "retry_window_steps": 1024, **settings}
        server, address = await serve(models, **settings)
        callers.append(Caller(server, address))
        return callers[-1]

    yield again
    await callers[-1].channel.close()


@pytest.mark.parametrize("by_crash", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 5, 6, 7, 20])
async def test_a_session_goes_on_where_it_was(restart: Restart, by_crash: bool, num_steps: int) -> None:
    inputs = random_inputs(num_steps + 5)
    caller = await restart()
    await caller.create("accumulator", request_id="r")
    for step in range(num_steps):
        await caller.step(inputs[step : step + 1], first_step=step)

    caller = await restart(by_crash)

    assert await caller.next_step() == num_steps
    outputs = await caller.step(inputs[num_steps:], first_step=num_steps)
    np.testing.assert_array_equal(outputs, accumulated(inputs)[num_steps:])
    assert (await caller.create("accumulator", request_id="r")).next_step == num_steps + 5


@pytest.mark.parametrize("by_crash", [False, True])
async def test_answers_are_still_given_again_and_other_inputs_refused(
    restart: Restart, by_crash: bool
) -> None:
    inputs = random_inputs(20)
    caller = await restart()
    await caller.create("accumulator")
    for first in range(0, 20, 4):
        await caller.step(inputs[first : first + 4], first_step=first)

    caller = await restart(by_crash)

    np.testing.assert_array_equal(await caller.step(inputs[3:17], first_step=3), accumulated(inputs)[3:17])
    await refused(caller.step(random_inputs(2, 9), first_step=3), ORDER, "INPUT_MISMATCH")
    await refused(caller.step(inputs[:1], first_step=21), ORDER, "STEP_GAP")


async def test_sessions_of_every_model_and_many_of_them_come_back_together(restart: Restart) -> None:
    inputs = {f"s{index}": random_inputs(9, index) for index in range(12)}
    caller = await restart(max_resident_sessions=16)
    for session_id, of_session in inputs.items():
        await caller.create("accumulator", session_id)
        await caller.step(of_session[:4], session_id)
        await caller.step(of_session[4:5], session_id)
    await caller.create("many_layouts", "other")
    await caller.step(random_inputs(3), "other")
    state = await caller.state("other")

    caller = await restart(max_resident_sessions=16)

    steps = [caller.step(of_session[5:], session_id) for session_id, of_session in inputs.items()]
    for outputs, of_session in zip(await asyncio.gather(*steps), inputs.values(), strict=True):
        np.testing.assert_array_equal(outputs, accumulated(of_session)[5:])
    for name, array in (await caller.state("other")).items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize("by_crash", [False, True])
async def test_a_reset_and_its_repeat_are_remembered(restart: Restart, by_crash: bool) -> None:
    inputs = random_inputs(5)
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(random_inputs(3, 9), first_step=0)
    await caller.stub.ResetSession(pb.ResetSessionRequest(session_id="s", at_step=3))
    await caller.step(inputs[:2], first_step=3)

    caller = await restart(by_crash)

    await caller.stub.ResetSession(pb.ResetSessionRequest(session_id="s", at_step=3))
    np.testing.assert_array_equal(await caller.step(inputs[2:], first_step=5), accumulated(inputs)[2:])


@pytest.mark.parametrize("by_crash", [False, True])
async def test_a_fork_and_its_source_come_back_apart(restart: Restart, by_crash: bool) -> None:
    inputs = random_inputs(6)
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(inputs[:4])
    fork = pb.ForkSessionRequest(source_session_id="s", session_id="f", request_id="r", at_step=4)
    await caller.stub.ForkSession(fork)
    await caller.step(random_inputs(1, 9))

    caller = await restart(by_crash)

    await caller.stub.ForkSession(fork)
    np.testing.assert_array_equal(await caller.step(inputs[4:], "f"), accumulated(inputs)[4:])
    assert await caller.next_step() == 5


@pytest.mark.parametrize("by_crash", [False, True])
async def test_an_id_stays_retired(restart: Restart, by_crash: bool) -> None:
    caller = await restart()
    await caller.create("accumulator", request_id="r")
    await caller.step(random_inputs(2))
    await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))

    caller = await restart(by_crash)

    await refused(caller.step(random_inputs(1), first_step=2), GONE, "SESSION_NOT_FOUND")
    await refused(caller.create("accumulator"), TAKEN, "SESSION_ID_RETIRED")
    await refused(caller.create("accumulator", request_id="r"), TAKEN, "SESSION_ID_RETIRED")


@pytest.mark.parametrize("by_crash", [False, True])
async def test_a_message_that_failed_is_answered_the_same_and_leaves_the_session_as_it_was(
    restart: Restart, by_crash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones, bad = np.ones((2, 3), np.float32), np.full((1, 3), -9, np.float32)
    caller = await restart()
    await caller.create("logarithm")
    await caller.step(ones, first_step=0)
    state = await caller.state()
    await refused(caller.step(bad, first_step=2), grpc.StatusCode.INTERNAL, "OUTPUT_NOT_FINITE")

    caller = await restart(by_crash)

    for name, array in (await caller.state()).items():
        np.testing.assert_array_equal(array, state[name])
    runner = caller.server.sessions.models.find("logarithm", None).runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", lambda inputs: 1 / 0)
        await refused(caller.step(bad, first_step=2), grpc.StatusCode.INTERNAL, "OUTPUT_NOT_FINITE")
    assert len(await caller.step(ones, first_step=2)) == 2


async def test_a_session_that_was_brought_back_need_not_be_replayed_again(restart: Restart) -> None:
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(random_inputs(4))

    caller = await restart()
    await caller.state()

    (claim,) = await caller.server.sessions.store.claim(["s"])
    assert b'"snapshot_step":4' in claim.entry.content
    assert b'"num_recoveries":0' in claim.entry.content


async def test_records_of_another_machine_are_refused_or_replayed_and_marked(
    restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(5)
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(inputs[:4])

    monkeypatch.setattr("server.runtime.provider._cpu", lambda: "another processor")
    caller = await restart()
    await refused(caller.step(inputs[4:]), ORDER, "RECOVERY_NOT_EXACT")
    assert (await caller.stub.GetSession(pb.GetSessionRequest(session_id="s"))).session.next_step == 4

    caller = await restart(recovery="approximate")
    np.testing.assert_array_equal(await caller.step(inputs[4:]), accumulated(inputs)[4:])
    assert (await caller.stub.GetSession(pb.GetSessionRequest(session_id="s"))).session.approximate
    caller = await restart(recovery="exact")
    assert (await caller.stub.GetState(pb.GetStateRequest(session_id="s"))).approximate


async def test_a_batch_says_which_of_its_sessions_are_approximate(
    restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = np.array([random_inputs(1, index) for index in range(4)])
    request = pb.BatchStepRequest(session_ids=["a", "exact", "b", "c"], inputs=to_message(inputs))
    caller = await restart()
    for session_id in "abc":
        await caller.create("accumulator", session_id)
        await caller.step(random_inputs(4), session_id)
    monkeypatch.setattr("server.runtime.provider._cpu", lambda: "another processor")
    caller = await restart(recovery="approximate")
    await caller.create("accumulator", "exact")

    brought_in = await caller.stub.BatchStep(request)
    in_memory = await caller.stub.BatchStep(request)

    assert (brought_in.next_steps, in_memory.next_steps) == ([5, 1, 5, 5], [6, 2, 6, 6])
    assert (brought_in.approximate, in_memory.approximate) == ([0, 2, 3], [0, 2, 3])


async def test_a_session_lost_while_it_is_brought_back_keeps_its_place_until_nothing_uses_it(
    restart: Restart,
) -> None:
    """Whoever got the place before would have its counter and its slot written over."""
    inputs = random_inputs(5)
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(inputs[:4])
    caller = await restart(max_resident_sessions=1)
    served = caller.server.sessions.models.find("accumulator", None)
    with caller.hold("accumulator"):
        lost = asyncio.ensure_future(caller.step(inputs[4:], first_step=4))
        while not served.table.num_taken:
            await asyncio.sleep(0)
        while not served.slots.num_used:  # until its replay is in the engine's line
            await asyncio.sleep(0.001)

        caller.server.sessions.store.lease.lapse()

        await refused(lost, grpc.StatusCode.UNAVAILABLE, "LEASE_LAPSED")
        assert served.table.num_taken == 1
    while served.table.num_taken:
        await asyncio.sleep(0.001)
    assert served.slots.num_used == 0
    np.testing.assert_array_equal(await caller.step(inputs[4:], first_step=4), accumulated(inputs)[4:])


async def test_a_snapshot_without_records_behind_it_is_exact_on_any_machine(
    restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(5)
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(inputs[:4])

    monkeypatch.setattr("server.runtime.provider._cpu", lambda: "another processor")
    caller = await restart(by_crash=False)

    np.testing.assert_array_equal(await caller.step(inputs[4:]), accumulated(inputs)[4:])
    assert not (await caller.stub.GetSession(pb.GetSessionRequest(session_id="s"))).session.approximate


async def test_a_session_whose_recovery_keeps_failing_is_quarantined_and_can_be_deleted(
    restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(random_inputs(4))
    caller = await restart()
    monkeypatch.setattr(
        caller.server.sessions.models.find("accumulator", None).runner, "run", lambda inputs: 1 / 0
    )

    for _ in range(3):
        await refused(caller.state(), grpc.StatusCode.DATA_LOSS, "SESSION_CORRUPT")
    await refused(caller.state(), grpc.StatusCode.DATA_LOSS, "SESSION_QUARANTINED")

    await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    await refused(caller.state(), GONE, "SESSION_NOT_FOUND")


async def test_a_session_of_a_model_that_is_gone_or_changed_says_so(restart: Restart, models: Path) -> None:
    caller = await restart()
    await caller.create("accumulator")
    await caller.create("delay_line", "d")
    await caller.step(random_inputs(1))

    (models / "accumulator").rename(models / ".accumulator")
    (models / "many_layouts" / "1" / "model.onnx").replace(models / "delay_line" / "1" / "model.onnx")
    caller = await restart()

    await refused(caller.step(random_inputs(1)), ORDER, "MODEL_NOT_LOADED")
    await refused(caller.step(random_inputs(1), "d"), ORDER, "MODEL_MISMATCH")
    await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
    (models / ".accumulator").rename(models / "accumulator")


async def test_an_initial_state_that_is_damaged_is_told_and_not_looked_for_again_and_again(
    restart: Restart, tmp_path: Path
) -> None:
    caller = await restart()
    begun = [tensor_pb2.NamedTensor(name="sum", value=to_message(np.ones(WIDTH, np.float32)))]
    await caller.create("accumulator", initial_state=begun)
    await caller.step(random_inputs(2))
    await caller.server.stop()
    with sqlite3.connect(tmp_path / "sessions.sqlite3") as database:
        [[content]] = database.execute("SELECT content FROM session").fetchall()
        of_another_shape = encode_initial_state({"sum": np.ones((WIDTH, 1), np.float32)})
        damaged = replace(SessionMetadata.decode(content), initial_state=of_another_shape)
        database.execute("UPDATE session SET content = ?", [damaged.encode()])
    database.close()

    caller = await restart()

    await refused(caller.step(random_inputs(1)), grpc.StatusCode.DATA_LOSS, "SESSION_CORRUPT")


async def test_a_snapshot_that_is_missing_is_noticed_and_not_taken_for_the_initial_state(
    restart: Restart, tmp_path: Path
) -> None:
    caller = await restart()
    await caller.create("accumulator")
    await caller.step(random_inputs(7))
    await caller.server.stop()
    with sqlite3.connect(tmp_path / "sessions.sqlite3") as database:
        database.execute("DELETE FROM snapshot")
    database.close()

    caller = await restart()

    await refused(caller.state(), grpc.StatusCode.DATA_LOSS, "SESSION_CORRUPT")
