"""Requests of one session each that come at once: they share a batch and a commit, and nothing else."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import server.sessions.executor
from ntm.v1 import session_service_pb2 as pb
from server.errors import (
    EngineFailedError,
    LeaseLapsedError,
    OutputNotFiniteError,
    SessionMovedError,
    StepFailedError,
)
from server.model.spec import StepModel
from tests.server.helpers import Admitted, Caller, accumulated, pending, random_inputs, submitted_to


async def test_a_request_that_was_cancelled_is_not_begun_when_its_turn_comes(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.create("accumulator")
    run = submitted_to(caller, "accumulator", monkeypatch)

    with caller.hold("accumulator"):
        first = Admitted(caller, "s", random_inputs(1))
        second = Admitted(caller, "s", random_inputs(1, 9))
        await asyncio.sleep(0)  # the first is in the engine's queue
        second.cancel()
        first.cancel()
        await pending(caller, "accumulator", 0)

    assert run == [["s"]]
    assert await caller.next_step() == 0


async def test_a_request_cancelled_in_the_turn_of_the_event_loop_it_came_in_is_not_run_nor_is_what_follows_it(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.create("accumulator")
    run = submitted_to(caller, "accumulator", monkeypatch)

    first = Admitted(caller, "s", random_inputs(1))
    follower = Admitted(caller, "s", random_inputs(1, 9), follows=first)
    first.cancel()
    await pending(caller, "accumulator", 0)

    assert run == []
    assert not follower.is_answered, "whoever cancels a request cancels those that follow it"
    assert await caller.next_step() == 0


async def test_requests_that_come_at_once_go_to_the_engine_together_and_give_what_each_gives_alone(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    alike, known, looking, few = [*"abcd"], [*"efgh"], [*"ijkl"], [*"mno"]
    names = [*alike, *known, *looking, *few]
    inputs = {name: random_inputs(4 if name in few else 3, seed) for seed, name in enumerate(names)}
    for name in names:
        await caller.create("accumulator", name)
    for name in known:
        await caller.step(inputs[name][:1], name)  # and is answered from the retry window below
    run = submitted_to(caller, "accumulator", monkeypatch)

    admitted = {name: Admitted(caller, name, inputs[name], 0, name in looking) for name in names}
    results = {name: await one.result() for name, one in admitted.items()}

    assert run == [names]
    for name, (outputs, next_step, state) in results.items():
        np.testing.assert_array_equal(outputs, accumulated(inputs[name]))
        assert next_step == len(inputs[name]) == await caller.next_step(name)
        assert [*state] == (["sum"] if name in looking else [])
    for name in looking:
        np.testing.assert_array_equal(results[name][2]["sum"], accumulated(inputs[name])[-1])


async def test_of_requests_in_one_batch_one_that_is_cancelled_leaves_it_and_the_others_keep_their_turn(
    roomy_caller: Caller,
) -> None:
    caller = roomy_caller
    served = caller.server.sessions.models.find("accumulator", None)
    inputs = {name: random_inputs(2, seed) for seed, name in enumerate("abcdz")}
    for name in inputs:
        await caller.create("accumulator", name)
    num_used = served.slots.num_used

    with caller.hold("accumulator"):
        admitted = [Admitted(caller, name, inputs[name], 0) for name in "abcd"]
        await asyncio.sleep(0)
        last = Admitted(caller, "z", inputs["z"], 0)
        await asyncio.sleep(0)
        admitted[1].cancel()
        await pending(caller, "accumulator", 4)
        assert served.slots.num_used == num_used + 4
        again = Admitted(caller, "b", inputs["b"][::-1], 0)
        await asyncio.sleep(0)

    for one, expected in zip(
        (admitted[0], *admitted[2:], last, again),
        [*(inputs[name] for name in "acdz"), inputs["b"][::-1]],
        strict=True,
    ):
        np.testing.assert_array_equal((await one.result())[0], accumulated(expected))
    num_used += len(inputs)  # none is in the initial one any more
    assert served.slots.num_used == num_used
    with caller.hold("accumulator"):
        admitted = [Admitted(caller, name, inputs[name], 2) for name in "abcd"]
        await asyncio.sleep(0)
        for one in admitted:
            one.cancel()
        await pending(caller, "accumulator", 0)
    assert served.slots.num_used == num_used
    assert [await caller.next_step(name) for name in inputs] == [2] * 5


async def test_of_requests_in_one_batch_one_that_fails_takes_no_state_from_those_who_asked_for_it(
    roomy_caller: Caller,
) -> None:
    caller = roomy_caller
    names = ["sinking", "one", "two", "three"]
    inputs = {name: np.full((1, 3), -9 if name == "sinking" else 1, np.float32) for name in names}
    for name in names:
        await caller.create("logarithm", name)

    sinking, *others = [Admitted(caller, name, inputs[name], 0, wants_state=True) for name in names]

    with pytest.raises(OutputNotFiniteError):
        await sinking.result()
    for other in others:
        np.testing.assert_array_equal((await other.result())[2]["sum"], np.full(3, 2))
    np.testing.assert_array_equal((await caller.state("sinking"))["sum"], np.ones(3))


async def test_of_requests_in_one_batch_only_what_follows_one_that_fails_is_not_run(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    run = submitted_to(caller, "logarithm", monkeypatch)
    names = ["sinking", "one", "two", "three"]
    followers = []
    for name in names:
        await caller.create("logarithm", name)

    for name in names:
        value = -9 if name == "sinking" else 1
        first = Admitted(caller, name, np.full((1, 3), value, np.float32), 0)
        followers.append(Admitted(caller, name, np.ones((1, 3), np.float32), follows=first))
    await pending(caller, "logarithm", 0)

    assert sorted(session_id for group in run for session_id in group) == sorted([*names, *names[1:]])
    assert [follower.is_answered for follower in followers] == [False, True, True, True]
    assert [await caller.next_step(name) for name in names] == [0, 2, 2, 2]


async def test_of_requests_in_one_batch_each_gets_the_snapshot_that_is_due(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    inputs = {name: random_inputs(6, seed) for seed, name in enumerate("abcdefgh")}
    for name in inputs:
        await caller.create("accumulator", name)
        await caller.step(inputs[name][: 3 if name in "abcd" else 1], name)
    snapshots = list[tuple[int, np.ndarray]]()
    encode = server.sessions.executor.encode_snapshot

    def encode_snapshot(model: StepModel, next_step: int, state: dict[str, np.ndarray]) -> bytes:
        snapshots.append((next_step, state["sum"].copy()))
        return encode(model, next_step, state)

    monkeypatch.setattr(server.sessions.executor, "encode_snapshot", encode_snapshot)

    with caller.hold("accumulator"):
        admitted = [
            Admitted(caller, name, inputs[name][3:] if name in "abcd" else inputs[name][1:4])
            for name in inputs
        ]
        await asyncio.sleep(0)
        admitted.pop(1).cancel()
    results = [await one.result() for one in admitted]

    assert not any(state for _, _, state in results)
    if not caller.server.sessions.store.backend.keeps_steps:
        assert not snapshots
        return
    assert [next_step for next_step, _ in snapshots] == [6, 6, 6]
    for name, (_, state) in zip("acd", snapshots, strict=True):
        np.testing.assert_array_equal(state, accumulated(inputs[name])[-1])


async def test_a_bug_as_requests_begin_keeps_none_of_them_waiting(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = caller.server.sessions.models.find("accumulator", None)
    for name in "abcde":
        await caller.create("accumulator", name)

    def take(*_: int) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(served.slots, "take", take)
        admitted = [Admitted(caller, name, random_inputs(1), 0) for name in "abcde"]
        for one in admitted:
            with pytest.raises(RuntimeError, match="a bug"):
                await one.result()

    assert not served.slots.num_used
    assert not served.num_pending
    np.testing.assert_array_equal(await caller.step(random_inputs(1), "a"), accumulated(random_inputs(1)))


async def test_a_bug_as_a_batch_is_committed_keeps_nobody_waiting_and_leaves_no_session_half_changed(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = caller.server.sessions.models.find("accumulator", None)
    for name in "abc":
        await caller.create("accumulator", name)

    def add(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(served.table.retry_windows, "add", add)
        patch.setattr(served.table.retry_windows, "add_each", add)
        with caller.hold("accumulator"):  # so that they are one batch, and end together
            admitted = [Admitted(caller, name, random_inputs(1), 0) for name in "abc"]
            await asyncio.sleep(0)
        for one in admitted:
            with pytest.raises(EngineFailedError):
                await one.result()

    assert not served.num_pending
    if caller.server.sessions.store.backend.keeps_steps:  # the store has the steps, and a repeat finds them
        for name in "abc":
            outputs = await caller.step(random_inputs(1), name, first_step=0)
            np.testing.assert_array_equal(outputs, accumulated(random_inputs(1)))


async def test_of_requests_in_one_batch_one_whose_session_is_lost_meanwhile_is_told_so_alone(
    roomy_caller: Caller,
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    served = manager.models.find("accumulator", None)
    for name in "abcd":
        await caller.create("accumulator", name)
    num_used = served.slots.num_used

    with caller.hold("accumulator"):
        admitted = [Admitted(caller, name, random_inputs(2), 0) for name in "abcd"]
        await asyncio.sleep(0)
        manager.executor.queues.lose(manager.in_memory["b"], SessionMovedError("b"))
    with pytest.raises(SessionMovedError):
        await admitted.pop(1).result()
    for one in admitted:
        np.testing.assert_array_equal((await one.result())[0], accumulated(random_inputs(2)))

    assert served.slots.num_used == num_used + 3
    assert "b" not in manager.in_memory


async def test_requests_in_one_batch_are_not_answered_when_the_lease_lapses_meanwhile(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    inputs = random_inputs(4)
    for name in "abcd":
        await caller.create("accumulator", name)

    with monkeypatch.context() as patch:
        with caller.hold("accumulator"):
            admitted = [Admitted(caller, name, inputs[:2], 0) for name in "abcd"]
            await asyncio.sleep(0)
            patch.setattr(type(caller.server.sessions.store), "holds_lease", False)
        for one in admitted:
            with pytest.raises(LeaseLapsedError):
                await one.result()

    # Nobody had taken them over: they are where the steps ended, and a repeat is answered from the retry window.
    for name in "abcd":
        np.testing.assert_array_equal(await caller.step(inputs, name, first_step=0), accumulated(inputs))


async def test_sessions_forked_from_one_another_step_in_one_batch_and_apart(roomy_caller: Caller) -> None:
    """They hold one slot, whose state is still cached where a run has left it."""
    caller = roomy_caller
    inputs = random_inputs(5)
    await caller.create("accumulator")
    await caller.step(inputs[:1])
    for name in "fgh":
        await caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="s", session_id=name))

    admitted = [Admitted(caller, name, inputs[row : row + 1], 1) for row, name in enumerate("sfgh", start=1)]

    for row, one in enumerate(admitted, start=1):
        np.testing.assert_array_equal((await one.result())[0], accumulated(inputs[[0, row]])[1:])


async def test_what_stands_behind_requests_goes_to_the_engine_before_they_are_answered(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    for name in "abcd":
        await caller.create("accumulator", name)
    run = submitted_to(caller, "accumulator", monkeypatch)

    first = [Admitted(caller, name, random_inputs(1)) for name in "abcd"]
    behind = [Admitted(caller, name, random_inputs(1)) for name in "abcd"]
    num_run_when_answered = []
    for one in first:
        await one.result()
        num_run_when_answered.append(sum(len(group) for group in run))
    for one in behind:
        await one.result()

    assert min(num_run_when_answered) > 4


async def test_a_request_that_failed_by_its_inputs_fails_again_without_running_after_a_restart_of_its_batch(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    good, bad = np.ones((2, 3), np.float32), np.full((2, 3), 99, np.float32)
    for name in ("good", "bad"):
        await caller.create("fragile", name)
    run = submitted_to(caller, "fragile", monkeypatch)

    for _ in range(2):
        sound, failing = Admitted(caller, "good", good, 0), Admitted(caller, "bad", bad, 0)
        await sound.result()
        with pytest.raises(StepFailedError):
            await failing.result()

    assert run == [["good", "bad"]]
