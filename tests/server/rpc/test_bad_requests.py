"""What is refused: by field and by code, with nothing left of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import tensor_pb2
from tests.server.helpers import (
    EXHAUSTED,
    GONE,
    INVALID,
    Caller,
    Start,
    pending,
    random_inputs,
    refused,
)


def tensor(shape: list[int], raw: bytes, dtype: Any = tensor_pb2.DATA_TYPE_FP32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, raw=raw)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        (tensor([1, 4], bytes(16)), "inputs.shape"),
        (tensor([3], bytes(12)), "inputs.shape"),
        (tensor([], bytes(4)), "inputs.shape"),
        (tensor([0, 3], b""), "inputs.shape"),
        (tensor([17, 3], bytes(17 * 12)), "inputs.shape"),
        (tensor([1, 3], bytes(11)), "inputs.raw"),
        (tensor([-1, -3], bytes(12)), "inputs.shape"),
        (tensor([-1] * 5000, b""), "inputs.shape"),
        (tensor([0, 2**62, 4], b""), "inputs.shape"),
        (tensor([1] * 65, bytes(4)), "inputs.shape"),
        (tensor([1, 3], b"\x00\x01\x02", tensor_pb2.DATA_TYPE_BOOL), "inputs.raw"),
        (tensor([1, 3], bytes(24), tensor_pb2.DATA_TYPE_FP64), "inputs.dtype"),
        (tensor([1, 3], bytes(12), tensor_pb2.DATA_TYPE_UNSPECIFIED), "inputs.dtype"),
        (tensor([1, 3], bytes(12), 99), "inputs.dtype"),
        (to_message(np.array([[0, np.nan, 0]], np.float32)), "inputs.raw"),
        (to_message(np.array([[0, 0, np.inf]], np.float32)), "inputs.raw"),
        (tensor([1, 40_000], bytes(160_000)), "inputs"),
    ],
)
async def test_inputs_that_do_not_fit_are_refused_by_field(
    caller: Caller, inputs: tensor_pb2.Tensor, field: str
) -> None:
    await caller.create("accumulator")
    await caller.step(random_inputs(1))

    told = await refused(
        caller.stub.Step(pb.StepRequest(session_id="s", inputs=inputs)), INVALID, "INVALID_INPUT"
    )

    assert told["field"] == field
    assert await caller.next_step() == 1


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
async def test_an_initial_state_that_is_not_finite_is_refused(caller: Caller, number: float) -> None:
    given = tensor_pb2.NamedTensor(name="sum", value=to_message(np.array([0, number, 0], np.float32)))

    told = await refused(caller.create("accumulator", initial_state=[given]), INVALID, "INVALID_INPUT")

    assert told["field"] == "initial_state[sum].raw"
    await refused(caller.step(random_inputs(1)), GONE, "SESSION_NOT_FOUND")


@pytest.mark.parametrize("session_id", ["", "a b", "ä", "x" * 129, "a/b"])
async def test_a_malformed_id_is_refused(caller: Caller, session_id: str) -> None:
    told = await refused(caller.step(random_inputs(1), session_id), INVALID, "INVALID_INPUT")

    assert told["field"] == "session_id"


async def test_an_unknown_session_is_not_found(caller: Caller) -> None:
    await refused(caller.step(random_inputs(1), "nobody"), GONE, "SESSION_NOT_FOUND")


async def test_an_unknown_state_name_is_refused_and_the_step_not_run(caller: Caller) -> None:
    await caller.create("accumulator")

    told = await refused(caller.step(random_inputs(1), include_state=["memory"]), INVALID, "INVALID_INPUT")

    assert told["field"] == "include_state"
    assert await caller.next_step() == 0


async def test_a_session_twice_in_one_batch_is_refused(caller: Caller) -> None:
    await caller.create("accumulator")
    inputs = to_message(np.zeros((2, 1, 3), np.float32))

    told = await refused(
        caller.stub.BatchStep(pb.BatchStepRequest(session_ids=["s", "s"], inputs=inputs)),
        INVALID,
        "INVALID_INPUT",
    )

    assert told["field"] == "session_ids"
    assert await caller.next_step() == 0


@pytest.mark.parametrize(
    ("ids", "first_steps", "shape", "field"),
    [
        (["a", "b"], [0], [2, 1, 3], "first_steps"),
        (["a", "b"], [], [1, 1, 3], "inputs.shape"),
        (["a"], [], [1, 3], "inputs.shape"),
        (["a"], [], [1, 0, 3], "inputs.shape"),
        ([], [], [0, 1, 3], "session_ids"),
        ([f"s{i}" for i in range(1025)], [], [1025, 1, 3], "session_ids"),
    ],
)
async def test_a_batch_that_does_not_fit_together_is_refused(
    caller: Caller, ids: list[str], first_steps: list[int], shape: list[int], field: str
) -> None:
    await caller.create("accumulator", "a")
    await caller.create("accumulator", "b")
    inputs = to_message(np.zeros(shape, np.float32))
    request = pb.BatchStepRequest(session_ids=ids, first_steps=first_steps, inputs=inputs)

    told = await refused(caller.stub.BatchStep(request), INVALID, "INVALID_INPUT")

    assert told["field"] == field


async def test_a_malformed_id_in_a_batch_fails_its_own_item(caller: Caller) -> None:
    await caller.create("accumulator")
    inputs = to_message(np.zeros((2, 1, 3), np.float32))

    answer = await caller.stub.BatchStep(pb.BatchStepRequest(session_ids=["a b", "s"], inputs=inputs))

    assert [(e.index, e.reason) for e in answer.errors] == [(0, "INVALID_INPUT")]


async def test_a_batch_whose_answer_would_not_fit_in_a_message_is_refused_before_anything_runs(
    serve: Start, models: Path
) -> None:
    """Room for every item's error counts: an answer must never be too large once steps have run."""
    server, address = await serve(models, max_resident_sessions=2)
    caller = Caller(server, address)
    await caller.create("accumulator")
    ids = ["s", *("x" * 120 + str(i) for i in range(1000, 2023))]
    too_many = to_message(np.zeros((1024, 300, 3), np.float32))
    enough = to_message(np.zeros((1024, 200, 3), np.float32))

    told = await refused(
        caller.stub.BatchStep(pb.BatchStepRequest(session_ids=ids, inputs=too_many)), INVALID, "INVALID_INPUT"
    )
    assert told["field"] == "inputs.shape"
    assert await caller.next_step() == 0
    answer = await caller.stub.BatchStep(pb.BatchStepRequest(session_ids=ids, inputs=enough))

    assert (len(answer.errors), answer.next_steps[0]) == (1023, 200)
    await caller.channel.close()


async def test_a_full_queue_is_refused_at_once_and_what_waits_is_served(caller: Caller) -> None:
    inputs = random_inputs(7)
    await caller.create("accumulator")
    with caller.hold("accumulator"):
        waiting = []
        for i in range(6):  # one after another, since calls sent at once may arrive in any order
            waiting.append(asyncio.ensure_future(caller.step(inputs[i : i + 1], first_step=i)))
            await pending(caller, "accumulator", i + 1)
        await refused(caller.step(inputs[6:], first_step=6), EXHAUSTED, "QUEUE_FULL")

    await asyncio.gather(*waiting)
    assert await caller.next_step() == 6


async def test_an_answer_that_would_not_fit_in_a_message_is_refused_before_anything_runs(
    serve: Start, models: Path
) -> None:
    server, address = await serve(
        models,
        max_message_bytes=128 * 1024,
        max_steps_per_message=10_000,
        retry_window_steps=10_000,
        max_resident_sessions=2,
    )
    caller = Caller(server, address)
    await caller.create("accumulator")

    told = await refused(caller.step(random_inputs(9_000)), INVALID, "INVALID_INPUT")

    assert told["field"] == "inputs.shape"
    assert await caller.next_step() == 0
    await caller.channel.close()


@pytest.mark.filterwarnings("error")
async def test_the_largest_inputs_are_taken_as_they_are(caller: Caller) -> None:
    inputs = np.array([[3e38, 3e38, -3e38]], np.float32)
    await caller.create("accumulator")

    np.testing.assert_array_equal(await caller.step(inputs), inputs)
