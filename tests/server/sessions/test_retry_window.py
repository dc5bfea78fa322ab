"""RetryWindows against a plain list of everything that ever ran."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InputMismatchError, StepGapError, StepTooOldError
from server.sessions.retry_window import RetryWindows

WINDOW = 40
NUM_PLACES = 4

# Sizes of messages that are applied one after another.
sizes_of_messages = st.lists(st.integers(1, WINDOW), max_size=20)


def histories_at(*next_steps: int) -> RetryWindows:
    histories = RetryWindows(NUM_PLACES, np.zeros((0, 2), np.float32), np.zeros((0, 3), np.float32), WINDOW)
    for place, next_step in enumerate(next_steps):
        histories.begin(place, next_step)
    return histories


def inputs_of(first_step: int, num_steps: int, place: int = 0) -> np.ndarray:
    steps = np.arange(first_step, first_step + num_steps)[:, None]
    return (1000 * place + steps + np.array([0.0, 0.5])).astype(np.float32)


def outputs_of(first_step: int, num_steps: int, place: int = 0) -> np.ndarray:
    return np.repeat(-inputs_of(first_step, num_steps, place)[:, :1], 3, axis=1)


def add(histories: RetryWindows, place: int, num_steps: int) -> None:
    step = histories.next_step.one[place]
    histories.add(place, inputs_of(step, num_steps, place), outputs_of(step, num_steps, place))


def add_each(histories: RetryWindows, places: list[int], num_steps: int) -> None:
    steps = [histories.next_step.one[place] for place in places]
    inputs = [inputs_of(step, num_steps, place) for step, place in zip(steps, places, strict=True)]
    outputs = [outputs_of(step, num_steps, place) for step, place in zip(steps, places, strict=True)]
    histories.add_each(np.array(places), np.array(inputs), np.array(outputs))


@given(sizes_of_messages, st.integers(0, 100), st.data())
def test_the_last_steps_are_answered_however_they_were_and_are_cut(
    sizes: list[int], begin: int, data: st.DataObject
) -> None:
    histories, next_step = histories_at(begin), begin
    for size in sizes:
        add(histories, 0, size)
        next_step += size
        oldest = max(begin, next_step - WINDOW)

        first = data.draw(st.integers(oldest, next_step - 1))
        num_steps = data.draw(st.integers(1, WINDOW))
        answered = histories.outputs_of(0, inputs_of(first, num_steps), first)

        assert (histories.next_step.one[0], histories.oldest_step(0)) == (next_step, oldest)
        np.testing.assert_array_equal(answered, outputs_of(first, min(num_steps, next_step - first)))


@given(
    st.lists(st.integers(0, 50), min_size=NUM_PLACES, max_size=NUM_PLACES),
    st.lists(
        st.tuples(st.sets(st.integers(0, NUM_PLACES - 1), min_size=1), st.sampled_from([1, 1, 1, 2, 16, 33])),
        max_size=60,
    ),
)
def test_sessions_that_step_together_have_a_history_each(
    begins: list[int], messages: list[tuple[set[int], int]]
) -> None:
    histories = histories_at(*begins)

    for places, num_steps in messages:
        add_each(histories, sorted(places), num_steps)

    for place, begin in enumerate(begins):
        next_step = begin + sum(num_steps for places, num_steps in messages if place in places)
        first = max(begin, next_step - WINDOW)
        assert (histories.next_step.one[place], histories.oldest_step(place)) == (next_step, first)
        inputs, outputs = (of(first, next_step - first, place) for of in (inputs_of, outputs_of))
        np.testing.assert_array_equal(histories.outputs_of(place, inputs, first), outputs)


@given(sizes_of_messages.filter(bool), st.data())
def test_what_does_not_fit_is_refused(sizes: list[int], data: st.DataObject) -> None:
    histories = histories_at(0)
    for size in sizes:
        add(histories, 0, size)
    oldest, next_step = histories.oldest_step(0), histories.next_step.one[0]
    wrong = data.draw(st.integers(oldest, next_step - 1))
    repeat = inputs_of(oldest, next_step - oldest)
    repeat[wrong - oldest, 1] = 77

    with pytest.raises(InputMismatchError, match=str(wrong)):
        histories.outputs_of(0, repeat, oldest)
    with pytest.raises(StepGapError):
        histories.outputs_of(0, repeat, next_step + 1)
    if oldest:
        with pytest.raises(StepTooOldError):
            histories.outputs_of(0, repeat, oldest - 1)


def test_what_is_answered_does_not_change_afterwards() -> None:
    histories = histories_at(0)
    add(histories, 0, 1)
    answered = histories.outputs_of(0, inputs_of(0, 1), 0)

    for _ in range(3 * WINDOW):
        add(histories, 0, 1)

    np.testing.assert_array_equal(answered, outputs_of(0, 1))


def test_who_comes_into_a_place_finds_nothing_of_who_was_there_before() -> None:
    histories = histories_at(0)
    for _ in range(WINDOW):
        add(histories, 0, 1)
    histories.add_reset(0)
    histories.end(0)

    histories.begin(0, 5)

    assert (histories.next_step.one[0], histories.oldest_step(0), histories.reset_steps(0)) == (5, 5, ())
    with pytest.raises(StepTooOldError):
        histories.outputs_of(0, inputs_of(4, 1), 4)


@pytest.mark.parametrize("is_together", [False, True])
def test_what_is_kept_of_a_long_message_is_the_sessions_own(is_together: bool) -> None:
    """Or one session that takes no more steps would keep the arrays of all that were in its batch."""
    histories = histories_at(0, 0)
    inputs, outputs = np.array([inputs_of(0, 20)] * 2), np.array([outputs_of(0, 20)] * 2)

    if is_together:
        histories.add_each(np.array([0, 1]), inputs, outputs)
    else:
        histories.add(0, inputs[0], outputs[0])

    ((_, kept_inputs, kept_outputs),) = histories._full_pages[0]
    assert kept_inputs.base is None
    assert kept_outputs.base is None


@pytest.mark.parametrize("num_steps", [1, 3, WINDOW])
def test_it_takes_no_more_room_than_the_window_and_a_message(num_steps: int) -> None:
    histories = histories_at(0)

    for _ in range(3 * WINDOW):
        add(histories, 0, num_steps)

    assert sum(len(inputs) for _, inputs, _ in histories._full_pages[0]) < WINDOW + max(num_steps, 16)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("is_together", [False, True])
def test_steps_can_be_scalars(num_steps: int, is_together: bool) -> None:
    histories = RetryWindows(1, np.zeros(0, np.float32), np.zeros(0, np.float32), WINDOW)
    histories.begin(0, 0)
    steps = np.arange(num_steps, dtype=np.float32)

    if is_together:
        histories.add_each(np.array([0]), steps[np.newaxis], -steps[np.newaxis])
    else:
        histories.add(0, steps, -steps)

    np.testing.assert_array_equal(histories.outputs_of(0, steps, 0), -steps)
