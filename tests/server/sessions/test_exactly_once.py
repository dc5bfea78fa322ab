"""A message takes effect once: what a repeat gets, however it is cut, and what is refused."""

from __future__ import annotations

import numpy as np

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from tests.server.helpers import (
    ORDER,
    Caller,
    accumulated,
    random_inputs,
    refused,
)


async def test_a_repeated_message_gets_the_recorded_answer_and_runs_once(caller: Caller) -> None:
    inputs = random_inputs(6)
    await caller.create("accumulator")

    first = await caller.step(inputs, first_step=0)
    again = await caller.step(inputs, first_step=0)

    np.testing.assert_array_equal(first, again)
    assert await caller.next_step() == 6
    np.testing.assert_array_equal((await caller.state())["sum"], accumulated(inputs)[-1])


async def test_a_retry_may_cut_the_steps_otherwise(caller: Caller) -> None:
    inputs = random_inputs(12)
    await caller.create("accumulator")
    await caller.step(inputs[:3], first_step=0)
    await caller.step(inputs[3:8], first_step=3)

    inside = await caller.step(inputs[2:5], first_step=2)
    beyond = await caller.step(inputs[1:12], first_step=1)

    np.testing.assert_array_equal(inside, accumulated(inputs)[2:5])
    np.testing.assert_array_equal(beyond, accumulated(inputs)[1:12])
    assert await caller.next_step() == 12


async def test_a_gap_is_refused_with_the_next_step(caller: Caller) -> None:
    await caller.create("accumulator")
    await caller.step(random_inputs(2))

    told = await refused(caller.step(random_inputs(1), first_step=5), ORDER, "STEP_GAP")

    assert told["next_step"] == "2"
    assert await caller.next_step() == 2


async def test_steps_beyond_the_retry_window_are_too_old(caller: Caller) -> None:
    inputs = random_inputs(40)
    await caller.create("accumulator")
    for first in range(0, 40, 8):
        await caller.step(inputs[first : first + 8], first_step=first)

    in_window = await caller.step(inputs[24:40], first_step=24)
    told = await refused(caller.step(inputs[0:4], first_step=0), ORDER, "STEP_TOO_OLD")

    np.testing.assert_array_equal(in_window, accumulated(inputs)[24:40])
    assert told["next_step"] == "40"


async def test_a_retry_with_other_inputs_is_refused(caller: Caller) -> None:
    inputs = random_inputs(4)
    await caller.create("accumulator")
    await caller.step(inputs, first_step=0)
    changed = inputs.copy()
    changed[2, 1] += 1

    told = await refused(caller.step(changed, first_step=0), ORDER, "INPUT_MISMATCH")

    assert told["next_step"] == "4"
    assert await caller.next_step() == 4


async def test_state_asked_for_with_a_repeat_is_the_state_of_then_or_an_error(caller: Caller) -> None:
    inputs = random_inputs(4)
    await caller.create("accumulator")
    await caller.step(inputs[:2], first_step=0)
    repeat = pb.StepRequest(
        session_id="s", first_step=0, inputs=to_message(inputs[:2]), include_state=["sum"]
    )

    answer = await caller.stub.Step(repeat)
    await caller.step(inputs[2:], first_step=2)

    np.testing.assert_array_equal(to_array(answer.state[0].value), accumulated(inputs)[1])
    await refused(caller.stub.Step(repeat), ORDER, "STATE_NOT_KEPT")
