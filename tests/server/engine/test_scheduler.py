"""The scheduler alone: fair turns, and requests that are cancelled."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import Scheduler


@dataclass(eq=False)
class Steps:
    """A request of so many steps."""

    name: str
    num_left: int
    num_rows: int = 1
    is_started: bool = False


def run(scheduler: Scheduler[Steps]) -> list[list[str]]:
    """Take turns until nobody waits; returns who was in each batch."""
    batches = []
    while batch := scheduler.next_batch():
        batches.append([request.name for request in batch])
        for request in batch:
            request.num_left -= 1
        for request in batch:
            if request.num_left:
                scheduler.enqueue(request)
    return batches


def scheduler_of(*requests: Steps, max_batch_size: int = 2, most_turns: int = 1) -> Scheduler[Steps]:
    scheduler: Scheduler[Steps] = Scheduler(max_batch_size, most_turns)
    for request in requests:
        scheduler.enqueue(request)
    return scheduler


def test_all_who_wait_run_together_up_to_the_batch_size() -> None:
    assert run(scheduler_of(*(Steps(name, 1) for name in "abcde"))) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_long_request_does_not_hold_up_short_ones() -> None:
    batches = run(scheduler_of(Steps("long", 4), Steps("x", 1), Steps("y", 1), Steps("z", 1)))

    assert batches == [["long", "x"], ["y", "z"], ["long"], ["long"], ["long"]]


def test_a_request_can_be_cancelled_until_its_first_turn() -> None:
    started, waiting = Steps("started", 2), Steps("waiting", 1)
    scheduler = scheduler_of(started, waiting, max_batch_size=1)
    (first,) = scheduler.next_batch()
    scheduler.enqueue(first)

    assert not scheduler.cancel(started)
    assert scheduler.cancel(waiting)
    assert scheduler
    assert scheduler.next_batch() == [started]
    assert not scheduler


LENGTHS = st.lists(st.integers(1, 9), max_size=12)
SIZES = st.integers(1, 5)
MOST_TURNS = st.sampled_from([1, 2, 4, 8])


@given(LENGTHS, SIZES, MOST_TURNS)
def test_every_request_gets_all_its_turns_and_never_two_in_a_batch(
    lengths: list[int], size: int, most_turns: int
) -> None:
    requests = [Steps(str(index), length) for index, length in enumerate(lengths)]

    batches = run(scheduler_of(*requests, max_batch_size=size, most_turns=most_turns))

    assert all(len(set(batch)) == len(batch) <= size for batch in batches)
    for index, length in enumerate(lengths):
        assert sum(str(index) in batch for batch in batches) == length


@given(LENGTHS, SIZES, MOST_TURNS)
def test_whoever_has_waited_longest_is_in_one_of_the_next_two_batches(
    lengths: list[int], size: int, most_turns: int
) -> None:
    requests = [Steps(str(index), length) for index, length in enumerate(lengths)]
    waiting = [request.name for request in requests]
    scheduler = scheduler_of(*requests, max_batch_size=size, most_turns=most_turns)

    batches, longest = [], []
    while batch := scheduler.next_batch():
        longest.append(waiting[0])
        batches.append([request.name for request in batch])
        for request in batch:
            request.num_left -= 1
            waiting.remove(request.name)
        unfinished = [request for request in batch if request.num_left]
        waiting += [request.name for request in unfinished]
        for request in unfinished:
            scheduler.enqueue(request)

    for name, (first, second) in zip(longest, pairwise(batches), strict=False):
        assert name in first + second


def test_a_run_is_not_cut_short_by_requests_with_fewer_turns_left_which_go_first() -> None:
    scheduler = scheduler_of(
        *(Steps(f"{length}{name}", length) for name in "ab" for length in (8, 1, 9, 3, 2)),
        max_batch_size=8,
        most_turns=8,
    )

    assert [{request.name for request in scheduler.next_batch()} for _ in range(4)] == [
        {"1a", "1b"},
        {"8a", "9a", "8b", "9b"},  # who had waited longest: nobody goes ahead of them twice
        {"3a", "2a", "3b", "2b"},
        set(),
    ]


def test_a_long_request_lets_no_more_than_two_batches_go_ahead_however_many_short_ones_come() -> None:
    scheduler = scheduler_of(Steps("long", 8), Steps("0", 1), most_turns=8)

    batches = []
    for number in range(1, 9):
        batches.append([request.name for request in scheduler.next_batch()])
        scheduler.enqueue(Steps(str(number), 1))
        if batches[-1] == ["long"]:
            scheduler.enqueue(Steps("long", 8))

    is_long = [batch == ["long"] for batch in batches]
    assert all(any(is_long[at : at + 3]) for at in range(len(is_long) - 2))


def test_requests_of_several_sessions_run_together_as_far_as_they_fit() -> None:
    scheduler = scheduler_of(
        Steps("a", 1, num_rows=3), Steps("b", 2, num_rows=2), Steps("c", 1), Steps("d", 1), max_batch_size=4
    )

    assert run(scheduler) == [["a"], ["b", "c", "d"], ["b"]]
