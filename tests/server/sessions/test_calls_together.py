"""Calls of one session each whose turn comes at once: they share a message of the engine, and nothing else."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import server.sessions.executor
from ntm.v1 import session_service_pb2 as pb
from server.engine.request import Message
from server.errors import LeaseLapsedError, OutputNotFiniteError, SessionMovedError
from server.model.spec import StepModel
from tests.server.helpers import Caller, accumulated, pending, random_inputs


def messages_of(caller: Caller, model: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a model's engine is given from now on: the sessions of each message of steps of calls."""
    served = caller.server.sessions.model(model, None)
    submitted, submit = list[list[str]](), served.submit_now

    def submit_now(messages: list[Message]) -> None:
        submitted.extend([*message.session_ids] for message in messages)
        submit(messages)

    monkeypatch.setattr(served, "submit_now", submit_now)
    return submitted


async def test_a_call_that_was_cancelled_is_not_begun_when_its_turn_comes(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = caller.server.sessions
    await caller.create("accumulator")
    run = messages_of(caller, "accumulator", monkeypatch)

    with caller.hold("accumulator"):
        first = manager.step(manager.in_memory["s"], random_inputs(1), None)
        second = manager.step(manager.in_memory["s"], random_inputs(1, 9), None)
        await asyncio.sleep(0)  # the first is in the engine's line
        # Taking the first out of line makes it the second's turn, before the second is taken out itself.
        second.future.cancel()
        manager.withdraw([first, second])
        await pending(caller, "accumulator", 0)

    assert run == [["s"]]
    assert await caller.next_step() == 0


async def test_a_call_cancelled_in_the_turn_of_the_event_loop_it_came_in_is_not_run(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = caller.server.sessions
    await caller.create("accumulator")
    run = messages_of(caller, "accumulator", monkeypatch)

    first = manager.step(manager.in_memory["s"], random_inputs(1), None)
    follower = manager.step(manager.in_memory["s"], random_inputs(1, 9), None, follows=first)
    manager.withdraw([first])
    await pending(caller, "accumulator", 0)

    assert run == []
    assert not follower.future.done(), "whoever withdraws a call withdraws those that follow it"
    assert await caller.next_step() == 0


async def test_calls_whose_turn_comes_at_once_run_in_one_message_and_give_what_each_gives_alone(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    alike, known, looking, few = [*"abcd"], [*"efgh"], [*"ijkl"], [*"mno"]
    names = [*alike, *known, *looking, *few]
    inputs = {name: random_inputs(4 if name in few else 3, seed) for seed, name in enumerate(names)}
    for name in names:
        await caller.create("accumulator", name)
    for name in known:
        await caller.step(inputs[name][:1], name)  # and is answered from the record below
    run = messages_of(caller, "accumulator", monkeypatch)

    calls = [
        manager.step(manager.in_memory[name], inputs[name], 0, wants_state=name in looking) for name in names
    ]
    results = dict(zip(names, await asyncio.gather(*[call.future for call in calls]), strict=True))

    assert sorted(run) == [alike, known, looking, *([name] for name in few)]
    for name in names:
        np.testing.assert_array_equal(results[name].outputs, accumulated(inputs[name]))
        assert results[name].outputs.base is None, "it would keep the outputs of all"
        assert results[name].next_step == len(inputs[name]) == await caller.next_step(name)
        assert [*results[name].state] == (["sum"] if name in looking else [])
    for name in looking:
        np.testing.assert_array_equal(results[name].state["sum"], accumulated(inputs[name])[-1])


async def test_of_calls_in_one_message_one_that_is_cancelled_leaves_it_and_the_others_keep_their_turn(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    served = manager.model("accumulator", None)
    run = messages_of(caller, "accumulator", monkeypatch)
    inputs = {name: random_inputs(2, seed) for seed, name in enumerate("abcdz")}
    for name in inputs:
        await caller.create("accumulator", name)
    num_used = served.slots.num_used

    with caller.hold("accumulator"):
        calls = [manager.step(manager.in_memory[name], inputs[name], 0) for name in "abcd"]
        await asyncio.sleep(0)
        last = manager.step(manager.in_memory["z"], inputs["z"], 0)
        await asyncio.sleep(0)
        manager.withdraw([calls[1]])
        await pending(caller, "accumulator", 4)
        assert served.slots.num_used == num_used + 4
        again = manager.step(manager.in_memory["b"], inputs["b"][::-1], 0)
        await asyncio.sleep(0)
    results = await asyncio.gather(*[call.future for call in (calls[0], *calls[2:], last, again)])

    assert run == [["a", "b", "c", "d"], ["z"], ["b"]]
    for result, expected in zip(
        results, [*(inputs[name] for name in "acdz"), inputs["b"][::-1]], strict=True
    ):
        np.testing.assert_array_equal(result.outputs, accumulated(expected))
    num_used += len(inputs)  # none is in the initial one any more
    assert served.slots.num_used == num_used
    with caller.hold("accumulator"):
        calls = [manager.step(manager.in_memory[name], inputs[name], 2) for name in "abcd"]
        await asyncio.sleep(0)
        manager.withdraw(calls)
        await pending(caller, "accumulator", 0)
    assert served.slots.num_used == num_used
    assert [await caller.next_step(name) for name in inputs] == [2] * 5


async def test_of_calls_in_one_message_one_that_fails_takes_no_state_from_those_who_asked_for_it(
    roomy_caller: Caller,
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    names = ["sinking", "one", "two", "three"]
    inputs = {name: np.full((1, 3), -9 if name == "sinking" else 1, np.float32) for name in names}
    for name in names:
        await caller.create("logarithm", name)

    calls = [manager.step(manager.in_memory[name], inputs[name], 0, wants_state=True) for name in names]
    failed, *passed = await asyncio.gather(*[call.future for call in calls], return_exceptions=True)

    assert isinstance(failed, OutputNotFiniteError)
    for result in passed:
        assert not isinstance(result, BaseException)
        np.testing.assert_array_equal(result.state["sum"], np.full(3, 2))
    np.testing.assert_array_equal((await caller.state("sinking"))["sum"], np.ones(3))


async def test_of_calls_in_one_message_only_what_follows_one_that_fails_is_not_run(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    run = messages_of(caller, "logarithm", monkeypatch)
    names = ["sinking", "one", "two", "three"]
    followers = []
    for name in names:
        await caller.create("logarithm", name)

    for name in names:
        session, value = manager.in_memory[name], -9 if name == "sinking" else 1
        first = manager.step(session, np.full((1, 3), value, np.float32), 0)
        followers.append(manager.step(session, np.ones((1, 3), np.float32), None, follows=first))
    await pending(caller, "logarithm", 0)

    assert run == [names, *([name] for name in names[1:])]
    assert [follower.future.done() for follower in followers] == [False, True, True, True]
    assert [await caller.next_step(name) for name in names] == [0, 2, 2, 2]


async def test_of_calls_in_one_message_each_gets_the_snapshot_that_is_due(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    inputs = {name: random_inputs(6, seed) for seed, name in enumerate("abcdefgh")}
    for name in inputs:
        await caller.create("accumulator", name)
        await caller.step(inputs[name][: 3 if name in "abcd" else 1], name)
    run, snapshots = messages_of(caller, "accumulator", monkeypatch), list[tuple[int, np.ndarray]]()
    encode = server.sessions.executor.encode_snapshot

    def encode_snapshot(model: StepModel, next_step: int, state: dict[str, np.ndarray]) -> bytes:
        snapshots.append((next_step, state["sum"].copy()))
        return encode(model, next_step, state)

    monkeypatch.setattr(server.sessions.executor, "encode_snapshot", encode_snapshot)

    with caller.hold("accumulator"):
        calls = [
            manager.step(
                manager.in_memory[name], inputs[name][3:] if name in "abcd" else inputs[name][1:4], None
            )
            for name in inputs
        ]
        await asyncio.sleep(0)
        manager.withdraw([calls[1]])
    results = await asyncio.gather(*[call.future for call in calls if not call.future.cancelled()])

    assert not any(result.state for result in results)
    if not manager.journal.store.keeps_steps:
        assert run == [[*inputs]]
        assert not snapshots
        return
    assert run == [[*"abcd"], [*"efgh"]], (
        "else the state of those that need no snapshot would be read as well"
    )
    assert [next_step for next_step, _ in snapshots] == [6, 6, 6]
    for name, (_, state) in zip("acd", snapshots, strict=True):
        np.testing.assert_array_equal(state, accumulated(inputs[name])[-1])


async def test_a_bug_as_calls_begin_keeps_none_of_them_waiting(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = caller.server.sessions
    served = manager.model("accumulator", None)
    for name in "abcde":  # four of them together, and one alone
        await caller.create("accumulator", name)

    def take(*_: int) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(served.slots, "take", take)
        patch.setattr(served.slots, "take_many", take)
        calls = [manager.step(manager.in_memory[name], random_inputs(1), 0) for name in "abcde"]
        outcomes = await asyncio.gather(*[call.future for call in calls], return_exceptions=True)

    assert [str(outcome) for outcome in outcomes] == ["a bug"] * 5
    assert not served.slots.num_used
    assert not served.num_pending
    np.testing.assert_array_equal(await caller.step(random_inputs(1), "a"), accumulated(random_inputs(1)))


async def test_a_bug_as_one_message_ends_keeps_none_of_those_behind_it_waiting(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = caller.server.sessions
    served = manager.model("accumulator", None)
    for name in "abc":  # fewer than share a message
        await caller.create("accumulator", name)
    submitted = list[Message]()
    with monkeypatch.context() as patch:
        patch.setattr(served, "submit_now", submitted.extend)
        calls = [manager.step(manager.in_memory[name], random_inputs(1), 0) for name in "abc"]
        await asyncio.sleep(0)

    on_ended = submitted[0].on_ended

    def with_a_bug(message: Message) -> None:
        assert on_ended is not None
        on_ended(message)
        raise RuntimeError("a bug")

    submitted[0].on_ended = with_a_bug
    with caller.hold("accumulator"):  # so that they are one batch, and end together
        served.submit_now(submitted)
    answers = await asyncio.wait_for(asyncio.gather(*[call.future for call in calls]), 30)

    for answer in answers:
        np.testing.assert_array_equal(answer.outputs, accumulated(random_inputs(1)))


async def test_of_calls_in_one_message_one_whose_session_is_lost_meanwhile_is_told_so_alone(
    roomy_caller: Caller,
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    served = manager.model("accumulator", None)
    for name in "abcd":
        await caller.create("accumulator", name)
    num_used = served.slots.num_used

    with caller.hold("accumulator"):
        calls = [manager.step(manager.in_memory[name], random_inputs(2), 0) for name in "abcd"]
        await asyncio.sleep(0)
        assert calls[0].company is calls[3].company is not None
        manager._lines.lose(manager.in_memory["b"], SessionMovedError("b"))
    outcomes = await asyncio.gather(*[call.future for call in calls], return_exceptions=True)

    assert isinstance(outcomes.pop(1), SessionMovedError)
    for result in outcomes:
        assert not isinstance(result, BaseException)
        np.testing.assert_array_equal(result.outputs, accumulated(random_inputs(2)))
    assert served.slots.num_used == num_used + 3
    assert "b" not in manager.in_memory


async def test_calls_in_one_message_are_not_answered_when_the_lease_lapses_meanwhile(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    inputs = random_inputs(4)
    for name in "abcd":
        await caller.create("accumulator", name)

    with monkeypatch.context() as patch:
        with caller.hold("accumulator"):
            calls = [manager.step(manager.in_memory[name], inputs[:2], 0) for name in "abcd"]
            await asyncio.sleep(0)
            patch.setattr(type(manager.journal), "holds_lease", False)
        outcomes = await asyncio.gather(*[call.future for call in calls], return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [LeaseLapsedError] * 4
    # Nobody had taken them over: they are where the steps ended, and a repeat is answered from the record.
    for name in "abcd":
        np.testing.assert_array_equal(await caller.step(inputs, name, first_step=0), accumulated(inputs))


async def test_calls_of_sessions_forked_from_one_another_step_together_and_apart(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold one slot, whose state still lodges where a run has left it."""
    caller = roomy_caller
    manager = caller.server.sessions
    inputs = random_inputs(5)
    await caller.create("accumulator")
    await caller.step(inputs[:1])
    for name in "fgh":
        await caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="s", session_id=name))
    run = messages_of(caller, "accumulator", monkeypatch)

    calls = [
        manager.step(manager.in_memory[name], inputs[row : row + 1], 1)
        for row, name in enumerate("sfgh", start=1)
    ]
    results = await asyncio.gather(*[call.future for call in calls])

    assert run == [[*"sfgh"]]
    for row, result in enumerate(results, start=1):
        np.testing.assert_array_equal(result.outputs, accumulated(inputs[[0, row]])[1:])


async def test_what_stands_behind_calls_of_one_message_goes_to_the_engine_before_they_are_answered(
    roomy_caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = roomy_caller
    manager = caller.server.sessions
    for name in "abcd":
        await caller.create("accumulator", name)
    run = messages_of(caller, "accumulator", monkeypatch)
    num_run_when_answered = []

    first = [manager.step(manager.in_memory[name], random_inputs(1), None) for name in "abcd"]
    behind = [manager.step(manager.in_memory[name], random_inputs(1), None) for name in "abcd"]
    for call in first:
        call.future.add_done_callback(lambda _: num_run_when_answered.append(len(run)))
    await asyncio.gather(*[call.future for call in behind])

    assert num_run_when_answered == [2] * 4
