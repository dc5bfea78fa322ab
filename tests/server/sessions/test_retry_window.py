"""RetryWindows against a plain list of everything that ever ran."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InputMismatchError, StepGapError, StepTooOldError
from server.sessions.retry_window import RetryWindows

WINDOW = 40
NUM_SESSIONS = 4
INPUT, OUTPUT = np.dtype("V8"), np.dtype("V12")

# Sizes of messages that are applied one after another.
sizes_of_messages = st.lists(st.integers(1, WINDOW), max_size=20)


def windows_at(*next_steps: int) -> RetryWindows:
    windows = RetryWindows(NUM_SESSIONS, INPUT, OUTPUT, WINDOW)
    for index, next_step in enumerate(next_steps):
        windows.begin(index, next_step)
    return windows


def inputs_of(first_step: int, num_steps: int, index: int = 0) -> np.ndarray:
    steps = np.arange(first_step, first_step + num_steps)[:, None]
    return (1000 * index + steps + np.array([0.0, 0.5])).astype(np.float32).view(INPUT)[:, 0]


def outputs_of(first_step: int, num_steps: int, index: int = 0) -> np.ndarray:
    inputs = inputs_of(first_step, num_steps, index).view(np.float32).reshape(-1, 2)
    return np.repeat(-inputs[:, :1], 3, axis=1).view(OUTPUT)[:, 0]


def add(windows: RetryWindows, index: int, num_steps: int) -> None:
    step = windows.next_step.one[index]
    windows.add(index, inputs_of(step, num_steps, index), outputs_of(step, num_steps, index))


def add_each(windows: RetryWindows, indices: list[int], num_steps: int) -> None:
    steps = [windows.next_step.one[index] for index in indices]
    inputs = [inputs_of(step, num_steps, index) for step, index in zip(steps, indices, strict=True)]
    outputs = [outputs_of(step, num_steps, index) for step, index in zip(steps, indices, strict=True)]
    windows.add_each(np.array(indices), np.array(inputs), np.array(outputs))


@given(sizes_of_messages, st.integers(0, 100), st.data())
def test_the_last_steps_are_answered_however_they_were_and_are_cut(
    sizes: list[int], begin: int, data: st.DataObject
) -> None:
    windows, next_step = windows_at(begin), begin
    for size in sizes:
        add(windows, 0, size)
        next_step += size
        oldest = max(begin, next_step - WINDOW)

        first = data.draw(st.integers(oldest, next_step - 1))
        num_steps = data.draw(st.integers(1, WINDOW))
        answered = windows.outputs_of(0, inputs_of(first, num_steps), first)

        assert (windows.next_step.one[0], windows.oldest_step(0)) == (next_step, oldest)
        np.testing.assert_array_equal(answered, outputs_of(first, min(num_steps, next_step - first)))


@given(
    st.lists(st.integers(0, 50), min_size=NUM_SESSIONS, max_size=NUM_SESSIONS),
    st.lists(
        st.tuples(
            st.sets(st.integers(0, NUM_SESSIONS - 1), min_size=1), st.sampled_from([1, 1, 1, 2, 16, 33])
        ),
        max_size=60,
    ),
)
def test_sessions_that_step_together_have_a_history_each(
    begins: list[int], messages: list[tuple[set[int], int]]
) -> None:
    windows = windows_at(*begins)

    for indices, num_steps in messages:
        add_each(windows, sorted(indices), num_steps)

    for index, begin in enumerate(begins):
        next_step = begin + sum(num_steps for indices, num_steps in messages if index in indices)
        first = max(begin, next_step - WINDOW)
        assert (windows.next_step.one[index], windows.oldest_step(index)) == (next_step, first)
        inputs, outputs = (of(first, next_step - first, index) for of in (inputs_of, outputs_of))
        np.testing.assert_array_equal(windows.outputs_of(index, inputs, first), outputs)


@given(sizes_of_messages.filter(bool), st.data())
def test_what_does_not_fit_is_refused(sizes: list[int], data: st.DataObject) -> None:
    windows = windows_at(0)
    for size in sizes:
        add(windows, 0, size)
    oldest, next_step = windows.oldest_step(0), windows.next_step.one[0]
    wrong = data.draw(st.integers(oldest, next_step - 1))
    repeat = inputs_of(oldest, next_step - oldest)
    repeat.view(np.float32).reshape(-1, 2)[wrong - oldest, 1] = 77

    with pytest.raises(InputMismatchError, match=str(wrong)):
        windows.outputs_of(0, repeat, oldest)
    with pytest.raises(StepGapError):
        windows.outputs_of(0, repeat, next_step + 1)
    if oldest:
        with pytest.raises(StepTooOldError):
            windows.outputs_of(0, repeat, oldest - 1)


def test_what_is_answered_does_not_change_afterwards() -> None:
    windows = windows_at(0)
    add(windows, 0, 1)
    answered = windows.outputs_of(0, inputs_of(0, 1), 0)

    for _ in range(3 * WINDOW):
        add(windows, 0, 1)

    np.testing.assert_array_equal(answered, outputs_of(0, 1))


def test_who_comes_into_a_place_finds_nothing_of_who_was_there_before() -> None:
    windows = windows_at(0)
    for _ in range(WINDOW):
        add(windows, 0, 1)
    windows.add_reset(0)
    windows.end(0)

    windows.begin(0, 5)

    assert (windows.next_step.one[0], windows.oldest_step(0), windows.reset_steps(0)) == (5, 5, ())
    with pytest.raises(StepTooOldError):
        windows.outputs_of(0, inputs_of(4, 1), 4)


@pytest.mark.parametrize("is_together", [False, True])
def test_what_is_kept_of_a_long_message_is_the_sessions_own(is_together: bool) -> None:
    """Or one session that takes no more steps would keep the arrays of all that were in its batch."""
    windows = windows_at(0, 0)
    inputs, outputs = np.array([inputs_of(0, 20)] * 2), np.array([outputs_of(0, 20)] * 2)

    if is_together:
        windows.add_each(np.array([0, 1]), inputs, outputs)
    else:
        windows.add(0, inputs[0], outputs[0])

    ((_, kept_inputs, kept_outputs),) = windows._full_pages[0]
    assert kept_inputs.base is None
    assert kept_outputs.base is None


@pytest.mark.parametrize("num_steps", [1, 3, WINDOW])
def test_it_takes_no_more_room_than_the_window_and_a_message(num_steps: int) -> None:
    windows = windows_at(0)

    for _ in range(3 * WINDOW):
        add(windows, 0, num_steps)

    assert sum(len(inputs) for _, inputs, _ in windows._full_pages[0]) < WINDOW + max(num_steps, 16)
