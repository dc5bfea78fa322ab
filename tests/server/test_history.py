"""The history against a plain list of everything that ever ran."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InputMismatchError, StepGapError, StepTooOldError
from server.history import History

WINDOW = 40

# Sizes of messages that are applied one after another, with a repeat of some steps after each.
messages = st.lists(st.integers(1, WINDOW), max_size=20)


def empty_history(next_step: int = 0) -> History:
    return History(np.zeros((0, 2), np.float32), np.zeros((0, 3), np.float32), WINDOW, next_step)


def inputs_of(first_step: int, num_steps: int) -> np.ndarray:
    return (np.arange(first_step, first_step + num_steps)[:, None] + np.array([0.0, 0.5])).astype(np.float32)


def outputs_of(first_step: int, num_steps: int) -> np.ndarray:
    return (-np.arange(first_step, first_step + num_steps)[:, None] * np.ones(3)).astype(np.float32)


@given(messages, st.integers(0, 100), st.data())
def test_the_last_steps_are_answered_however_they_were_and_are_cut(
    sizes: list[int], begin: int, data: st.DataObject
) -> None:
    history, next_step = empty_history(begin), begin
    for size in sizes:
        history.add(inputs_of(next_step, size), outputs_of(next_step, size))
        next_step += size
        oldest = max(begin, next_step - WINDOW)

        first = data.draw(st.integers(oldest, next_step - 1))
        num_steps = data.draw(st.integers(1, WINDOW))
        answered = history.outputs_of(inputs_of(first, num_steps), first)

        assert (history.next_step, history.oldest_step) == (next_step, oldest)
        np.testing.assert_array_equal(answered, outputs_of(first, min(num_steps, next_step - first)))


@given(messages.filter(bool), st.data())
def test_what_does_not_fit_is_refused(sizes: list[int], data: st.DataObject) -> None:
    history = empty_history()
    for size in sizes:
        history.add(inputs_of(history.next_step, size), outputs_of(history.next_step, size))
    wrong = data.draw(st.integers(history.oldest_step, history.next_step - 1))
    repeat = inputs_of(history.oldest_step, history.next_step - history.oldest_step)
    repeat[wrong - history.oldest_step, 1] = 77

    with pytest.raises(InputMismatchError, match=str(wrong)):
        history.outputs_of(repeat, history.oldest_step)
    with pytest.raises(StepGapError):
        history.outputs_of(repeat, history.next_step + 1)
    if history.oldest_step:
        with pytest.raises(StepTooOldError):
            history.outputs_of(repeat, history.oldest_step - 1)


def test_what_is_answered_does_not_change_afterwards() -> None:
    history = empty_history()
    history.add(inputs_of(0, 1), outputs_of(0, 1))
    answered = history.outputs_of(inputs_of(0, 1), 0)

    for step in range(1, 3 * WINDOW):
        history.add(inputs_of(step, 1), outputs_of(step, 1))

    np.testing.assert_array_equal(answered, outputs_of(0, 1))


def test_it_takes_no_more_room_than_the_window() -> None:
    history = empty_history()
    history.add(inputs_of(0, 1), outputs_of(0, 1))
    assert len(history._inputs) < WINDOW

    for step in range(1, 3 * WINDOW):
        history.add(inputs_of(step, 1), outputs_of(step, 1))

    assert len(history._inputs) == len(history._outputs) == WINDOW


@pytest.mark.parametrize("num_steps", [1, 2])
def test_steps_can_be_scalars(num_steps: int) -> None:
    history = History(np.zeros(0, np.float32), np.zeros(0, np.float32), WINDOW)
    steps = np.arange(num_steps, dtype=np.float32)

    history.add(steps, -steps)

    np.testing.assert_array_equal(history.outputs_of(steps, 0), -steps)
