"""The scheduler alone: fair turns, and messages that are withdrawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.scheduler import Scheduler


@dataclass(eq=False)
class Steps:
    """A message of so many steps."""

    name: str
    num_left: int
    num_rows: int = 1
    is_started: bool = False


def run(scheduler: Scheduler[Steps]) -> list[list[str]]:
    """Take turns until nobody waits; returns who was in each batch."""
    batches = []
    while batch := scheduler.next_batch():
        batches.append([message.name for message in batch])
        for message in batch:
            message.num_left -= 1
        scheduler.put_back([message for message in batch if message.num_left])
    return batches


def scheduler_of(*messages: Steps, max_batch_size: int = 2) -> Scheduler[Steps]:
    scheduler: Scheduler[Steps] = Scheduler(max_batch_size)
    for message in messages:
        scheduler.add(message)
    return scheduler


def test_all_who_wait_run_together_up_to_the_batch_size() -> None:
    assert run(scheduler_of(*(Steps(name, 1) for name in "abcde"))) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_long_message_does_not_hold_up_short_ones() -> None:
    batches = run(scheduler_of(Steps("long", 4), Steps("x", 1), Steps("y", 1), Steps("z", 1)))

    assert batches == [["long", "x"], ["y", "z"], ["long"], ["long"], ["long"]]


def test_a_message_can_be_withdrawn_until_its_first_turn() -> None:
    started, waiting = Steps("started", 2), Steps("waiting", 1)
    scheduler = scheduler_of(started, waiting, max_batch_size=1)
    scheduler.put_back(scheduler.next_batch())

    assert not scheduler.withdraw(started)
    assert scheduler.withdraw(waiting)
    assert len(scheduler) == 1


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_every_message_gets_all_its_turns_and_never_two_in_a_batch(lengths: list[int], size: int) -> None:
    messages = [Steps(str(index), length) for index, length in enumerate(lengths)]

    batches = run(scheduler_of(*messages, max_batch_size=size))

    assert all(len(set(batch)) == len(batch) <= size for batch in batches)
    for index, length in enumerate(lengths):
        assert sum(str(index) in batch for batch in batches) == length


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_nobody_waits_longer_than_a_round_of_the_line(lengths: list[int], size: int) -> None:
    """Between two turns of a message every other gets at most one."""
    messages = [Steps(str(index), length) for index, length in enumerate(lengths)]

    turns = [name for batch in run(scheduler_of(*messages, max_batch_size=size)) for name in batch]

    for name in set(turns):
        positions = [index for index, turn in enumerate(turns) if turn == name]
        for first, second in pairwise(positions):
            between = turns[first + 1 : second]
            assert len(set(between)) == len(between)


def test_messages_of_several_sessions_run_together_as_far_as_they_fit() -> None:
    scheduler = scheduler_of(
        Steps("a", 1, num_rows=3), Steps("b", 2, num_rows=2), Steps("c", 1), Steps("d", 1), max_batch_size=4
    )

    assert run(scheduler) == [["a"], ["b", "c", "d"], ["b"]]
