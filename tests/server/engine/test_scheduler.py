"""The scheduler alone: fair turns, and messages that are withdrawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import Scheduler


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


def scheduler_of(
    *messages: Steps, max_batch_size: int = 2, most_turns: int = 1, halves_from: int | None = None
) -> Scheduler[Steps]:
    scheduler: Scheduler[Steps] = Scheduler(max_batch_size, most_turns, halves_from)
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
    assert scheduler
    assert scheduler.next_batch() == [started]
    assert not scheduler


def test_a_message_can_need_less_room_until_its_first_turn() -> None:
    started, waiting = Steps("started", 2, num_rows=2), Steps("waiting", 1, num_rows=2)
    scheduler = scheduler_of(started, waiting, max_batch_size=3)
    scheduler.put_back(scheduler.next_batch())

    assert not scheduler.shrink(started)
    assert scheduler.shrink(waiting)
    waiting.num_rows -= 1

    assert scheduler.next_batch() == [waiting, started], "there is room for both now"
    assert not scheduler


LENGTHS = st.lists(st.integers(1, 9), max_size=12)
SIZES = st.integers(1, 5)
MOST_TURNS = st.sampled_from([1, 2, 4, 8])
HALVES_FROM = st.none() | st.integers(1, 9)


@given(LENGTHS, SIZES, MOST_TURNS, HALVES_FROM)
def test_every_message_gets_all_its_turns_and_never_two_in_a_batch(
    lengths: list[int], size: int, most_turns: int, halves_from: int | None
) -> None:
    messages = [Steps(str(index), length) for index, length in enumerate(lengths)]

    batches = run(
        scheduler_of(*messages, max_batch_size=size, most_turns=most_turns, halves_from=halves_from)
    )

    assert all(len(set(batch)) == len(batch) <= size for batch in batches)
    for index, length in enumerate(lengths):
        assert sum(str(index) in batch for batch in batches) == length


@given(LENGTHS, SIZES, MOST_TURNS, HALVES_FROM)
def test_whoever_has_waited_longest_is_in_one_of_the_next_two_batches(
    lengths: list[int], size: int, most_turns: int, halves_from: int | None
) -> None:
    messages = [Steps(str(index), length) for index, length in enumerate(lengths)]
    waiting = [message.name for message in messages]
    scheduler = scheduler_of(*messages, max_batch_size=size, most_turns=most_turns, halves_from=halves_from)

    batches, longest = [], []
    while batch := scheduler.next_batch():
        longest.append(waiting[0])
        batches.append([message.name for message in batch])
        for message in batch:
            message.num_left -= 1
            waiting.remove(message.name)
        unfinished = [message for message in batch if message.num_left]
        waiting += [message.name for message in unfinished]
        scheduler.put_back(unfinished)

    for name, (first, second) in zip(longest, pairwise(batches), strict=False):
        assert name in first + second


def test_a_run_is_not_cut_short_by_messages_with_fewer_turns_left_which_go_first() -> None:
    scheduler = scheduler_of(
        *(Steps(f"{length}{name}", length) for name in "ab" for length in (8, 1, 9, 3, 2)),
        max_batch_size=8,
        most_turns=8,
    )

    assert [{message.name for message in scheduler.next_batch()} for _ in range(4)] == [
        {"1a", "1b"},
        {"8a", "9a", "8b", "9b"},  # who had waited longest: nobody goes ahead of them twice
        {"3a", "2a", "3b", "2b"},
        set(),
    ]


def test_a_long_message_lets_no_more_than_two_batches_go_ahead_however_many_short_ones_come() -> None:
    scheduler = scheduler_of(Steps("long", 8), Steps("0", 1), most_turns=8)

    batches = []
    for number in range(1, 9):
        batches.append([message.name for message in scheduler.next_batch()])
        scheduler.add(Steps(str(number), 1))
        if batches[-1] == ["long"]:
            scheduler.add(Steps("long", 8))

    is_long = [batch == ["long"] for batch in batches]
    assert all(any(is_long[at : at + 3]) for at in range(len(is_long) - 2))


def test_messages_of_many_turns_run_in_two_halves_that_take_turns() -> None:
    messages = [Steps(name, 100) for name in "abcdefgh"]

    batches = run(scheduler_of(*messages, max_batch_size=8, most_turns=8, halves_from=8))

    assert batches[:180] == [["a", "b", "c", "d"], ["e", "f", "g", "h"]] * 90


def test_halves_of_different_size_become_equal() -> None:
    scheduler = scheduler_of(*(Steps(name, 100) for name in "abcdef"), max_batch_size=8, halves_from=1)
    first = scheduler.next_batch()
    for name in "gh":
        scheduler.add(Steps(name, 100))
    second = scheduler.next_batch()
    scheduler.put_back(first)
    third = scheduler.next_batch()

    assert [len(first), len(second), len(third)] == [4, 4, 4]


def test_halves_are_no_smaller_than_half_the_largest_batch_and_split_no_message() -> None:
    few = [Steps(name, 9) for name in "abcd"]
    assert run(scheduler_of(*few, max_batch_size=8, halves_from=1))[0] == ["a", "b", "c", "d"]

    large = [Steps("large", 9, num_rows=7), Steps("x", 9)]
    assert run(scheduler_of(*large, max_batch_size=8, halves_from=1))[0] == ["large"]


def test_all_run_in_one_batch_where_turns_are_few() -> None:
    messages = [Steps(name, 3) for name in "abcdefgh"]

    assert run(scheduler_of(*messages, max_batch_size=8, most_turns=8, halves_from=4))[0] == list("abcdefgh")


def test_messages_of_several_sessions_run_together_as_far_as_they_fit() -> None:
    scheduler = scheduler_of(
        Steps("a", 1, num_rows=3), Steps("b", 2, num_rows=2), Steps("c", 1), Steps("d", 1), max_batch_size=4
    )

    assert run(scheduler) == [["a"], ["b", "c", "d"], ["b"]]
