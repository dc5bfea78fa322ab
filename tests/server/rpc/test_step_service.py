"""Step, BatchStep and StreamSteps through a real server: what is run, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import structlog.testing

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from server.sessions.request import BatchReply, EngineCall, StepRequest, Waiter
from tests.server.helpers import (
    GONE,
    INVALID,
    ORDER,
    Admitted,
    Caller,
    accumulated,
    pending,
    random_inputs,
    refused,
    submitted_to,
)


async def test_a_session_carries_its_state_from_message_to_message(caller: Caller) -> None:
    inputs = random_inputs(10)
    await caller.create("accumulator")

    outputs = [await caller.step(inputs[:1]), await caller.step(inputs[1:8]), await caller.step(inputs[8:])]

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


async def test_a_delay_line_is_served_right(caller: Caller) -> None:
    """Its next states do not depend on the states they replace, so nothing in the graph orders the updates."""
    inputs = random_inputs(12)
    await caller.create("delay_line")

    outputs = np.concatenate([await caller.step(inputs[:5]), await caller.step(inputs[5:])])

    np.testing.assert_array_equal(outputs, np.concatenate([np.zeros((2, 3), np.float32), inputs[:-2]]))


async def test_batch_axes_transposed_memory_integers_and_constants_are_served_as_the_spec_says(
    caller: Caller,
) -> None:
    inputs = random_inputs(2)
    await caller.create("many_layouts")

    outputs = await caller.step(inputs)
    state = await caller.state()

    layers = np.ones((2, 3), np.float32)
    memory, count = np.arange(8, dtype=np.float32).reshape(2, 4), 5
    for row, output in zip(inputs, outputs, strict=True):
        layers, count = layers + row, count + 1
        memory = memory + np.float32(count * 0.25)
        np.testing.assert_array_equal(output, layers[0] + layers[1] + count)
    np.testing.assert_array_equal(state["memory"], memory.T)
    np.testing.assert_array_equal(state["layers"], layers)
    assert state["count"] == count


async def test_state_is_returned_along_with_a_step_as_it_is_after_the_last(caller: Caller) -> None:
    inputs = random_inputs(3)
    await caller.create("accumulator")

    request = pb.StepRequest(session_id="s", inputs=to_message(inputs), include_state=["sum"])
    answer = await caller.stub.Step(request)

    np.testing.assert_array_equal(to_array(answer.state[0].value), accumulated(inputs)[-1])


async def test_a_stream_answers_each_message_in_order(caller: Caller) -> None:
    inputs = random_inputs(9)
    await caller.create("accumulator")

    async def messages() -> AsyncIterator[pb.StreamStepsRequest]:
        for first in (0, 2, 4):
            size = 5 if first == 4 else 2
            step = pb.StepRequest(
                session_id="s", first_step=first, inputs=to_message(inputs[first : first + size])
            )
            yield pb.StreamStepsRequest(step=step)

    answers = [answer async for answer in caller.stub.StreamSteps(messages())]

    assert [answer.step.next_step for answer in answers] == [2, 4, 9]
    outputs = np.concatenate([to_array(answer.step.outputs) for answer in answers])
    np.testing.assert_array_equal(outputs, accumulated(inputs))


async def test_the_first_message_that_fails_ends_a_stream_and_those_after_it_are_not_run(
    caller: Caller,
) -> None:
    await caller.create("accumulator")

    async def messages() -> AsyncIterator[pb.StreamStepsRequest]:
        for inputs in (random_inputs(2), np.full((1, 3), np.nan, np.float32), random_inputs(3)):
            yield pb.StreamStepsRequest(step=pb.StepRequest(session_id="s", inputs=to_message(inputs)))

    answers = []

    async def read() -> None:
        async for answer in caller.stub.StreamSteps(messages()):
            answers.append(answer)

    await refused(read(), INVALID, "INVALID_INPUT")
    assert [answer.step.next_step for answer in answers] == [2]
    assert await caller.next_step() == 2


async def test_a_batch_runs_many_sessions_and_one_that_fails_leaves_the_others_alone(caller: Caller) -> None:
    inputs = np.stack([random_inputs(3, seed) for seed in range(4)])
    for index in (0, 1, 3):
        await caller.create("accumulator", f"s{index}")
    await caller.step(random_inputs(1), "s3")

    answer = await caller.stub.BatchStep(
        pb.BatchStepRequest(
            session_ids=["s0", "s1", "nobody", "s3"], first_steps=[0, 0, 0, 7], inputs=to_message(inputs)
        )
    )

    outputs = to_array(answer.outputs)
    np.testing.assert_array_equal(outputs[0], accumulated(inputs[0]))
    np.testing.assert_array_equal(outputs[1], accumulated(inputs[1]))
    np.testing.assert_array_equal(outputs[2:], np.zeros((2, 3, 3)))
    assert list(answer.next_steps) == [3, 3, 0, 0]
    assert [(e.index, e.code, e.reason) for e in answer.errors] == [
        (2, GONE.value[0], "SESSION_NOT_FOUND"),
        (3, ORDER.value[0], "STEP_GAP"),
    ]
    assert answer.errors[1].metadata["next_step"] == "1"


async def test_a_batch_whose_inputs_no_session_takes_is_refused_as_a_whole(caller: Caller) -> None:
    await caller.create("accumulator", "a")
    await caller.create("delay_line", "b")
    inputs = to_message(np.zeros((2, 1, 4), np.float32))

    told = await refused(
        caller.stub.BatchStep(pb.BatchStepRequest(session_ids=["a", "b"], inputs=inputs)),
        INVALID,
        "INVALID_INPUT",
    )

    assert told["field"] == "inputs.shape"
    assert await caller.next_step("a") == 0


async def test_one_batch_may_hold_sessions_of_models_that_take_and_give_the_same(caller: Caller) -> None:
    inputs = np.stack([random_inputs(3, seed) for seed in range(2)])
    await caller.create("accumulator", "a")
    await caller.create("delay_line", "b")

    answer = await caller.stub.BatchStep(
        pb.BatchStepRequest(session_ids=["a", "b"], inputs=to_message(inputs))
    )

    np.testing.assert_array_equal(to_array(answer.outputs)[0], accumulated(inputs[0]))
    np.testing.assert_array_equal(to_array(answer.outputs)[1, 2], inputs[1, 0])


# Isolation and batching, with the device held so that the test decides what is in a batch.


async def test_sessions_that_share_batches_give_what_each_gives_alone(caller: Caller) -> None:
    all_inputs = [random_inputs(1 + seed, seed) for seed in range(6)]
    for index in range(6):
        await caller.create("accumulator", f"s{index}")

    with caller.hold("accumulator"):
        steps = [
            asyncio.ensure_future(caller.step(inputs, f"s{index}")) for index, inputs in enumerate(all_inputs)
        ]
        await pending(caller, "accumulator", 6)

    for inputs, outputs in zip(all_inputs, await asyncio.gather(*steps), strict=True):
        np.testing.assert_array_equal(outputs, accumulated(inputs))


async def test_a_node_that_fails_mid_graph_fails_its_own_session_and_leaves_no_half_state(
    caller: Caller,
) -> None:
    good, bad = random_inputs(3), random_inputs(3)
    good[:, 0], bad[:, 0] = 1.0, [1.0, 2.0, 99.0]
    await caller.create("fragile", "good")
    await caller.create("fragile", "bad")
    await caller.step(good[:1], "bad")
    before = await caller.state("bad")

    with caller.hold("fragile"):
        failing = asyncio.ensure_future(caller.step(bad, "bad"))
        passing = asyncio.ensure_future(caller.step(good, "good"))
        await pending(caller, "fragile", 2)

    await refused(failing, grpc.StatusCode.INTERNAL, "STEP_FAILED")
    np.testing.assert_array_equal(await passing, 2 * np.cumsum(good, axis=0))
    after = await caller.state("bad")
    np.testing.assert_array_equal(after["first"], before["first"])
    np.testing.assert_array_equal(after["second"], before["second"])
    assert await caller.next_step("bad") == 1


async def test_a_numbered_message_that_failed_is_answered_again_without_running(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = random_inputs(3), random_inputs(3)
    good[:, 0], bad[:, 0] = 1.0, [1.0, 2.0, 99.0]
    await caller.create("fragile", "good")
    await caller.create("fragile", "bad")
    run = submitted_to(caller, "fragile", monkeypatch)

    for num_batches in range(2):
        request = pb.BatchStepRequest(
            session_ids=["good", "bad"],
            first_steps=[3 * num_batches, 0],
            inputs=to_message(np.stack([good, bad])),
        )
        answer = await caller.stub.BatchStep(request)
        assert [(error.index, error.reason) for error in answer.errors] == [(1, "STEP_FAILED")]
    await refused(caller.step(bad, "bad", first_step=0), grpc.StatusCode.INTERNAL, "STEP_FAILED")

    assert run == [["good", "bad"], ["good"]]
    np.testing.assert_array_equal(await caller.step(good, "bad", first_step=0), 2 * np.cumsum(good, axis=0))


async def test_outputs_that_are_not_finite_fail_the_whole_message_of_their_session_alone(
    caller: Caller,
) -> None:
    inputs = np.ones((3, 3), np.float32)
    sinking = np.array([[1, 1, 1], [1, 1, 1], [1, 1, -9]], np.float32)
    await caller.create("logarithm", "well")
    await caller.create("logarithm", "sinking")

    with caller.hold("logarithm"):
        failing = asyncio.ensure_future(caller.step(sinking, "sinking"))
        passing = asyncio.ensure_future(caller.step(inputs, "well"))
        await pending(caller, "logarithm", 2)

    await refused(failing, grpc.StatusCode.INTERNAL, "OUTPUT_NOT_FINITE")
    np.testing.assert_allclose((await passing)[:, 0], np.log([2, 3, 4]), rtol=1e-6)
    np.testing.assert_array_equal((await caller.state("sinking"))["sum"], np.ones(3))
    assert await caller.next_step("sinking") == 0


async def test_a_message_cancelled_before_its_first_turn_leaves_no_trace(caller: Caller) -> None:
    await caller.create("accumulator")
    with caller.hold("accumulator"):
        call = caller.stub.Step(pb.StepRequest(session_id="s", inputs=to_message(random_inputs(2))))
        await pending(caller, "accumulator", 1)
        call.cancel()
        await pending(caller, "accumulator", 0)

    assert await caller.next_step() == 0
    np.testing.assert_array_equal(await caller.step(random_inputs(2)), accumulated(random_inputs(2)))


async def test_a_message_whose_deadline_passes_in_the_queue_leaves_no_trace(caller: Caller) -> None:
    await caller.create("accumulator")
    with caller.hold("accumulator"):
        request = pb.StepRequest(session_id="s", inputs=to_message(random_inputs(2)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller.stub.Step(request, timeout=0.2)
        await pending(caller, "accumulator", 0)

    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await caller.next_step() == 0


async def test_a_call_cancelled_behind_another_of_its_session_leaves_the_order_of_the_rest(
    caller: Caller,
) -> None:
    inputs = random_inputs(4)
    await caller.create("accumulator")
    with caller.hold("accumulator"):
        first = asyncio.ensure_future(caller.step(inputs[:2], first_step=0))
        await pending(caller, "accumulator", 1)
        second = caller.stub.Step(pb.StepRequest(session_id="s", inputs=to_message(random_inputs(1, 9))))
        await pending(caller, "accumulator", 2)
        third = asyncio.ensure_future(caller.step(inputs[2:], first_step=2))
        await pending(caller, "accumulator", 3)
        second.cancel()
        await pending(caller, "accumulator", 2)

    np.testing.assert_array_equal(np.concatenate([await first, await third]), accumulated(inputs))


def a_batch(
    caller: Caller, ids: str, inputs: np.ndarray, first_steps: list[int] | None = None
) -> asyncio.Task[Any]:
    """A BatchStep that is sent and not waited for; sessions have names of one letter."""
    request = pb.BatchStepRequest(session_ids=list(ids), inputs=to_message(inputs), first_steps=first_steps)

    async def answer() -> pb.BatchStepResponse:
        return await caller.stub.BatchStep(request)

    return asyncio.ensure_future(answer())


async def test_batches_of_the_same_sessions_that_wait_for_one_another_run_in_order(caller: Caller) -> None:
    inputs = np.stack([random_inputs(9, seed) for seed in range(2)])
    await caller.create("accumulator", "a")
    await caller.create("accumulator", "b")

    with caller.hold("accumulator"):
        first = a_batch(caller, "ab", inputs[:, :2])
        await pending(caller, "accumulator", 2)
        second = a_batch(caller, "ab", inputs[:, 2:5], [2, 2])
        await pending(caller, "accumulator", 4)
        alone = asyncio.ensure_future(caller.step(inputs[1, 5:], "b"))
        await pending(caller, "accumulator", 5)
        third = a_batch(caller, "a", inputs[:1, 5:])
        await pending(caller, "accumulator", 6)

    outputs = [to_array((await batch).outputs) for batch in (first, second, third)]
    for row in range(2):
        expected = accumulated(inputs[row])
        np.testing.assert_array_equal(outputs[0][row], expected[:2])
        np.testing.assert_array_equal(outputs[1][row], expected[2:5])
        np.testing.assert_array_equal(outputs[2][0] if row == 0 else await alone, expected[5:])


async def test_a_batch_that_waits_serves_alone_a_session_that_is_not_where_the_others_are(
    caller: Caller,
) -> None:
    inputs = np.stack([random_inputs(4, seed) for seed in range(3)])
    for name in "abc":
        await caller.create("accumulator", name)

    with caller.hold("accumulator"):
        first = a_batch(caller, "abc", inputs[:, :2])
        await pending(caller, "accumulator", 3)
        # For b a repeat in part, for c a gap.
        later = np.stack([inputs[0, 2:4], inputs[1, 1:3], inputs[2, 2:4]])
        second = a_batch(caller, "abc", later, [2, 1, 7])
        await pending(caller, "accumulator", 6)

    await first
    answer = await second
    outputs = to_array(answer.outputs)
    np.testing.assert_array_equal(outputs[0], accumulated(inputs[0])[2:4])
    np.testing.assert_array_equal(outputs[1], accumulated(inputs[1])[1:3])
    assert list(answer.next_steps) == [4, 3, 0]
    assert [(error.index, error.reason) for error in answer.errors] == [(2, "STEP_GAP")]
    assert [await caller.next_step(name) for name in "abc"] == [4, 3, 2]


async def test_a_waiting_batch_that_is_cancelled_leaves_its_place_to_the_next(caller: Caller) -> None:
    inputs = np.stack([random_inputs(4, seed) for seed in range(2)])
    await caller.create("accumulator", "a")
    await caller.create("accumulator", "b")

    with caller.hold("accumulator"):
        first = a_batch(caller, "ab", inputs[:, :2])
        await pending(caller, "accumulator", 2)
        second = a_batch(caller, "ab", inputs[:, :1])
        await pending(caller, "accumulator", 4)
        third = a_batch(caller, "ab", inputs[:, 2:4])
        await pending(caller, "accumulator", 6)
        second.cancel()
        await pending(caller, "accumulator", 4)

    await first
    outputs = to_array((await third).outputs)
    for row in range(2):
        np.testing.assert_array_equal(outputs[row], accumulated(inputs[row])[2:4])


async def test_a_batch_that_is_cancelled_takes_out_what_has_not_begun(caller: Caller) -> None:
    inputs = np.zeros((3, 1, 3), np.float32)
    for index in range(3):
        await caller.create("accumulator", f"s{index}")
    with caller.hold("accumulator"):
        request = pb.BatchStepRequest(session_ids=["s0", "s1", "s2"], inputs=to_message(inputs))
        call = caller.stub.BatchStep(request)
        await pending(caller, "accumulator", 3)
        call.cancel()
        await pending(caller, "accumulator", 0)

    assert [await caller.next_step(f"s{index}") for index in range(3)] == [0, 0, 0]


async def test_a_move_that_fails_answers_every_caller_and_leaves_their_sessions(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = caller.server.sessions.models.find("accumulator", None).runner
    inputs = random_inputs(2)
    for index in range(2):
        await caller.create("accumulator", f"s{index}")
        await caller.step(inputs[:1], f"s{index}")

    def fail(sources: object, targets: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "move", fail)
        with caller.hold("accumulator"):
            steps = [asyncio.ensure_future(caller.step(inputs[1:], f"s{index}")) for index in range(2)]
            await pending(caller, "accumulator", 2)
        for step in steps:
            await refused(step, grpc.StatusCode.INTERNAL, "ENGINE_FAILED")

    for index in range(2):
        outputs = await caller.step(inputs[1:], f"s{index}", first_step=1)
        np.testing.assert_array_equal(outputs, accumulated(inputs)[1:])


async def test_metrics_that_fail_do_not_stop_the_engine(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = caller.server.sessions.models.find("accumulator", None).engine
    await caller.create("accumulator")

    monkeypatch.setattr(engine, "_on_batch", lambda report: 1 / 0)

    np.testing.assert_array_equal(await caller.step(random_inputs(2)), accumulated(random_inputs(2)))


async def test_a_bug_is_answered_internal_without_its_inside_and_logged_whole(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.create("accumulator")
    monkeypatch.setattr(caller.server.sessions.executor, "admit", lambda *args, **kwargs: 1 / 0)

    with structlog.testing.capture_logs() as log:
        await refused(caller.step(random_inputs(1)), grpc.StatusCode.INTERNAL, "BUG")

    assert [entry["event"] for entry in log] == ["a call failed unexpectedly"]
    assert isinstance(log[0]["exc_info"], ZeroDivisionError)


async def test_sessions_forked_from_one_another_step_together_and_apart(caller: Caller) -> None:
    """They hold one slot, whose state still lodges where a run has left it."""
    inputs = random_inputs(3)
    await caller.create("accumulator")
    await caller.step(inputs[:1])
    for session_id in ("f", "g"):
        request = pb.ForkSessionRequest(source_session_id="s", session_id=session_id)
        await caller.stub.ForkSession(request)
    batch = np.stack([inputs[1:2], inputs[2:3], inputs[1:2]])

    answer = await a_batch(caller, "sfg", batch)

    for outputs, own in zip(to_array(answer.outputs), batch, strict=True):
        expected = accumulated(np.concatenate([inputs[:1], own]))[1:]
        np.testing.assert_array_equal(outputs, expected)


async def test_what_has_been_answered_leaves_nothing_for_the_collector(roomy_caller: Caller) -> None:
    """A message's objects go when it is answered; in cycles they would pile up, and wait to be collected."""
    caller = roomy_caller

    async def requests() -> AsyncIterator[pb.StreamStepsRequest]:
        for _ in range(3):
            yield pb.StreamStepsRequest(step=pb.StepRequest(session_id="s", inputs=inputs))

    inputs = to_message(random_inputs(2))
    await caller.create("accumulator")
    for name in "tuvwx":
        await caller.create("accumulator", session_id=name)
    gc.collect()
    gc.disable()
    try:
        await caller.step(random_inputs(2))
        assert len([answer async for answer in caller.stub.StreamSteps(requests())]) == 3
        for first_steps in ([8, 0], [8, 2]):  # together, and one of them a repeat
            together = to_message(np.stack([random_inputs(2)] * 2))
            request = pb.BatchStepRequest(session_ids=["s", "t"], first_steps=first_steps, inputs=together)
            assert not (await caller.stub.BatchStep(request)).errors
        await caller.state()
        await asyncio.sleep(0.05)  # for the stream's tasks to end
        admitted = [Admitted(caller, name, random_inputs(1)) for name in "uvwx"]
        await asyncio.gather(*[one.result() for one in admitted])
        with caller.hold("accumulator"):
            cancelled = [Admitted(caller, name, random_inputs(1)) for name in "uvwx"]
            await asyncio.sleep(0)
            for one in cancelled:
                one.cancel()
        del admitted, cancelled, one

        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [
            item for item in gc.garbage if isinstance(item, StepRequest | Waiter | BatchReply | EngineCall)
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()

    assert not found
