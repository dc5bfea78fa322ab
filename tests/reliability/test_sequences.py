"""What the tests of Triton's sequence batcher cover, here too: its sequences are our sessions.

Elsewhere in tests/server:

- no start: test_bad_requests, an unknown session; two starts, no end, an id used again: test_session_service
- slot exhaustion and backlog: test_session_service without a store, test_paging with one
- idle timeout: test_session_service; shutdown with live sequences: test_lifecycle, test_recovery, and test_kills here
- deadline and cancel in the queue: test_step_service
- random mixes under stress: test_random_histories and test_kills here

In this file: one-step sequences, string and integer ids, the same id in the backlog, a late step after an idle
timeout out of memory, cancel in the batch and on a stream, no mixing of state after cancel and timeout.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from tests.reliability.helpers import Restart, refusal_of
from tests.server.helpers import GONE, TAKEN, Caller, accumulated, pending, random_inputs, refused
from tests.server.rpc.test_session_service import in_the_future


@pytest.fixture
async def caller(restart: Restart, store: str) -> Caller:
    return await restart(store=store, max_resident_sessions=8)


async def no_calls(caller: Caller) -> None:
    """Wait until the server has learnt of all cancellations."""
    while caller.server.calls.num_calls:
        await asyncio.sleep(0)


async def test_sessions_of_one_step_run_together_and_leave_nothing(caller: Caller) -> None:
    inputs = random_inputs(8)
    for index in range(8):
        await caller.create("accumulator", f"s{index}")

    with caller.hold("accumulator"):
        steps = [asyncio.ensure_future(caller.step(inputs[i : i + 1], f"s{i}")) for i in range(8)]
        await pending(caller, "accumulator", 8)
    outputs = await asyncio.gather(*steps)
    for index in range(8):
        await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id=f"s{index}"))

    np.testing.assert_array_equal(np.concatenate(outputs), inputs)
    served = caller.server.sessions.models.find("accumulator", None)
    assert (served.num_sessions, served.slots.num_used, served.num_pending) == (0, 0, 0)


async def test_ids_are_text_also_where_they_look_like_numbers(caller: Caller) -> None:
    inputs = {name: random_inputs(2, n) for n, name in enumerate(["7", "07", "7.0", "0x7", "-7"])}
    for name in inputs:
        await caller.create("accumulator", name)

    for name, of_session in inputs.items():
        np.testing.assert_array_equal(await caller.step(of_session, name), accumulated(of_session))
    assert await refusal_of(caller.step(random_inputs(1), "007")) == "SESSION_NOT_FOUND"


async def test_calls_for_one_session_that_waits_for_room_are_served_in_order(
    restart: Restart, store: str
) -> None:
    caller = await restart(store=store, max_resident_sessions=1)
    inputs = random_inputs(6)
    await caller.create("accumulator", "out")
    await caller.step(inputs[:2], "out", first_step=0)
    await caller.create("accumulator", "in")

    with caller.hold("accumulator"):
        busy = asyncio.ensure_future(caller.step(random_inputs(1), "in"))
        await pending(caller, "accumulator", 1)
        waiting = []
        for at in range(2, 6):  # one after another, since calls sent at once may arrive in any order
            waiting.append(asyncio.ensure_future(caller.step(inputs[at : at + 1], "out", first_step=at)))
            while caller.server.calls.num_calls < 1 + len(waiting):
                await asyncio.sleep(0)
        again = asyncio.ensure_future(refusal_of(caller.create("accumulator", "out")))
        assert await again == "SESSION_EXISTS"

    await busy
    outputs = np.concatenate(await asyncio.gather(*waiting))
    np.testing.assert_array_equal(outputs, accumulated(inputs)[2:])


async def test_a_late_step_of_a_session_that_expired_out_of_memory_is_refused(
    restart: Restart, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await restart(store=store, max_resident_sessions=1, idle_limit_s=3600)
    await caller.create("accumulator", "out")
    await caller.step(random_inputs(2), "out")
    await caller.create("accumulator", "in")

    in_the_future(monkeypatch, caller.server.sessions.store, 3601)
    await caller.step(random_inputs(1), "in")
    await caller.server.sessions.expire_idle()

    await refused(caller.step(random_inputs(1), "out", first_step=2), GONE, "SESSION_EXPIRED")
    await refused(caller.create("accumulator", "out"), TAKEN, "SESSION_ID_RETIRED")
    assert await caller.next_step("in") == 1


async def test_a_message_cancelled_after_its_first_turn_has_begun_runs_to_its_end(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(5)
    await caller.create("accumulator")
    runner = caller.server.sessions.models.find("accumulator", None).runner
    has_begun, may_go_on, run = threading.Event(), threading.Event(), runner.run

    def run_when_told(*args: object, **named: object) -> np.ndarray:
        has_begun.set()
        assert may_go_on.wait(30)
        return run(*args, **named)

    monkeypatch.setattr(runner, "run", run_when_told)
    call = caller.stub.Step(pb.StepRequest(session_id="s", first_step=0, inputs=to_message(inputs[:4])))
    sent = asyncio.ensure_future(call.code())
    await asyncio.to_thread(has_begun.wait, 30)
    call.cancel()
    await no_calls(caller)
    may_go_on.set()

    assert await sent == grpc.StatusCode.CANCELLED
    np.testing.assert_array_equal((await caller.state())["sum"], accumulated(inputs)[3])
    np.testing.assert_array_equal(await caller.step(inputs, first_step=0), accumulated(inputs))


async def test_a_stream_that_is_cancelled_takes_its_waiting_messages_along(caller: Caller) -> None:
    inputs = random_inputs(4)
    await caller.create("accumulator")

    async def messages() -> AsyncIterator[pb.StreamStepsRequest]:
        for at in range(4):
            step = pb.StepRequest(session_id="s", first_step=at, inputs=to_message(inputs[at : at + 1]))
            yield pb.StreamStepsRequest(step=step)

    with caller.hold("accumulator"):
        stream = caller.stub.StreamSteps(messages())
        reading = asyncio.ensure_future(stream.read())
        await pending(caller, "accumulator", 4)
        stream.cancel()
        await no_calls(caller)
        await pending(caller, "accumulator", 0)

    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await caller.next_step() == 0
    np.testing.assert_array_equal(await caller.step(inputs, first_step=0), accumulated(inputs))


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_sessions_whose_neighbours_left_the_batch_are_as_if_alone(caller: Caller, how: str) -> None:
    inputs = {f"s{index}": random_inputs(6, index) for index in range(8)}
    for name, of_session in inputs.items():
        await caller.create("accumulator", name)
        await caller.step(of_session[:2], name, first_step=0)

    def send(name: str, timeout: float | None) -> Any:
        request = pb.StepRequest(session_id=name, first_step=2, inputs=to_message(inputs[name][2:4]))
        return caller.stub.Step(request, timeout=timeout)

    with caller.hold("accumulator"):
        calls = {}
        for n, name in enumerate(inputs):
            leaves = n % 2 == 1
            calls[name] = send(name, 0.3 if leaves and how == "timed out" else None)
            await pending(caller, "accumulator", n + 1)
        for n, name in enumerate(inputs):
            if n % 2 == 1 and how == "cancelled":
                calls[name].cancel()
        await pending(caller, "accumulator", 4)

    for n, (name, of_session) in enumerate(inputs.items()):
        assert await calls[name].code() == (
            grpc.StatusCode.OK
            if n % 2 == 0
            else grpc.StatusCode.CANCELLED
            if how == "cancelled"
            else grpc.StatusCode.DEADLINE_EXCEEDED
        )
        assert await caller.next_step(name) == (4 if n % 2 == 0 else 2)
        outputs = await caller.step(of_session[2:], name, first_step=2)
        np.testing.assert_array_equal(outputs, accumulated(of_session)[2:])


async def test_messages_for_other_sessions_behind_one_that_fails_on_a_stream_are_not_run(
    caller: Caller,
) -> None:
    failing = np.array([[9, 0, 0]], np.float32)
    await caller.create("fragile", "fails")
    await caller.create("accumulator", "behind")

    async def messages() -> AsyncIterator[pb.StreamStepsRequest]:
        for name, inputs in (("fails", failing), ("behind", random_inputs(1))):
            yield pb.StreamStepsRequest(step=pb.StepRequest(session_id=name, inputs=to_message(inputs)))

    with caller.hold("fragile"):
        reading = asyncio.ensure_future(caller.stub.StreamSteps(messages()).read())
        await pending(caller, "fragile", 1)
        await asyncio.sleep(0.2)  # time for the second to run, if it did not wait
    await refused(reading, grpc.StatusCode.INTERNAL, "STEP_FAILED")

    assert await caller.next_step("behind") == 0
