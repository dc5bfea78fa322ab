"""RetryWindows: how far each session of a model has come, what was answered, and where it was reset.

They are what makes a repeated message safe: the steps that have run already are answered from here, however the repeat
cuts them into messages, and everything that does not fit is refused with the session's counter.

A session has its history in its place (`room.py`): the counters and the last few steps of all are columns, so that a
step of many sessions is on record after one operation for all of them.

Shapes: S sessions, T steps of a message, W steps of the window, P steps of a page.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ntm.tensor import Array
from server.errors import InputMismatchError, StepGapError, StepTooOldError
from server.runtime.columns import Column
from server.runtime.runner import Rows

_PAGE_STEPS = 16

_Page = tuple[int, Array, Array]
"""Index of the first step; inputs and outputs [steps, ...shape]. The garbage collector soon skips a plain tuple."""


class RetryWindows:
    """The inputs and outputs of each session's last W steps, or of all, where there were fewer.

    They are on pages. The one being written, of P steps, is a row of arrays that all sessions share. A full one is
    copied, and kept with its session as long as the window reaches into it, so a session takes no more memory than its
    steps need. A message as long as a page is one.
    """

    def __init__(self, num_places: int, no_inputs: Array, no_outputs: Array, window_steps: int) -> None:
        """No session is in any place.

        Args:
            num_places: how many sessions there can be.
            no_inputs: [0, ...input shape], the inputs of no steps.
            no_outputs: [0, ...output shape], the outputs of no steps.
            window_steps: W.
        """
        self.next_step = Column(num_places, 0)
        """The session's counter: it only grows."""
        self._first_step = Column(num_places, 0)
        self._page_step = Column(num_places, 0)
        """Where the page being written begins."""
        self._inputs = np.zeros((num_places, _PAGE_STEPS, *no_inputs.shape[1:]), no_inputs.dtype)
        self._outputs = np.zeros((num_places, _PAGE_STEPS, *no_outputs.shape[1:]), no_outputs.dtype)
        self._no_outputs = no_outputs
        self._full_pages: dict[int, list[_Page]] = {}
        self._reset_steps: dict[int, tuple[int, ...]] = {}
        self._window_steps = window_steps

    def begin(self, place: int, next_step: int, reset_steps: Iterable[int] = ()) -> None:
        """Let a history begin in a place, with nothing on record but where the session was reset."""
        self.next_step.one[place] = self._first_step.one[place] = self._page_step.one[place] = next_step
        self._full_pages[place] = []
        self._reset_steps[place] = tuple(reset_steps)

    def end(self, place: int) -> None:
        """Forget the history in a place."""
        del self._full_pages[place], self._reset_steps[place]

    def oldest_step(self, place: int) -> int:
        """The first step whose answer is still recorded."""
        return max(self._first_step.one[place], self.next_step.one[place] - self._window_steps)

    def add(self, place: int, inputs: Array, outputs: Array) -> None:
        """Record a message that was applied, [T, ...] each, and forget what is older than the window."""
        num_steps, step = len(inputs), self.next_step.one[place]
        row = step - self._page_step.one[place]
        if row and row + num_steps > _PAGE_STEPS:
            self._turn_page(place)
            row = 0
        if num_steps < _PAGE_STEPS:
            self._inputs[place, row : row + num_steps] = inputs
            self._outputs[place, row : row + num_steps] = outputs
            self.next_step.one[place] = step + num_steps
            if row + num_steps == _PAGE_STEPS:
                self._turn_page(place)
        else:
            self.next_step.one[place] = self._page_step.one[place] = step + num_steps
            # Copies: these may be parts of arrays of a whole batch, which one session is not to keep.
            self._keep(place, (step, inputs.copy(), outputs.copy()))

    def add_each(self, places: Rows, inputs: Array, outputs: Array) -> None:
        """As `add`, for sessions in several places [S], none twice: inputs and outputs [S, T, ...]."""
        if inputs.shape[1] == 1:
            steps = self.next_step.each[places]
            rows = steps - self._page_step.each[places]
            self._inputs[places, rows] = inputs[:, 0]
            self._outputs[places, rows] = outputs[:, 0]
            self.next_step.each[places] = steps + 1
            for place in places[rows == _PAGE_STEPS - 1].tolist():
                self._turn_page(place)
        else:
            for place, its_inputs, its_outputs in zip(places.tolist(), inputs, outputs, strict=True):
                self.add(place, its_inputs, its_outputs)

    def reset_steps(self, place: int) -> tuple[int, ...]:
        """Where the session was reset, as far as that is on record."""
        resets = self._reset_steps[place]
        if resets and resets[0] < (oldest := self.oldest_step(place)):
            self._reset_steps[place] = resets = tuple(step for step in resets if step >= oldest)
        return resets

    def add_reset(self, place: int) -> None:
        """Record a reset at the present step."""
        self._reset_steps[place] = (*self.reset_steps(place), self.next_step.one[place])

    def was_reset_at(self, place: int, step: int) -> bool:
        """Whether a reset at this step is on record."""
        return step in self.reset_steps(place)

    def check_is_at(self, place: int, step: int) -> None:
        """That the counter is at a step.

        Raises:
            StepGapError: it has not come there. StepTooOldError: it is past it.
        """
        next_step = self.next_step.one[place]
        if step > next_step:
            raise StepGapError(step, next_step)
        if step < next_step:
            raise StepTooOldError(step, next_step, next_step)

    def outputs_of(self, place: int, inputs: Array, first_step: int | None) -> Array:
        """The outputs [K, ...output shape] of the first K of some inputs, those that have run; K may be 0.

        Args:
            place: the session's.
            inputs: [T, ...input shape].
            first_step: index of the first, or None for the next step.

        Raises:
            StepGapError: it is beyond the counter. StepTooOldError: it is before the window.
            InputMismatchError: a step has run with other bytes.
        """
        next_step = self.next_step.one[place]
        if first_step is None or first_step == next_step:
            return self._no_outputs
        if first_step > next_step:
            raise StepGapError(first_step, next_step)
        if first_step < (oldest := self.oldest_step(place)):
            raise StepTooOldError(first_step, oldest, next_step)
        end_step = min(first_step + len(inputs), next_step)
        outputs = [self._no_outputs]
        for page_step, page_inputs, page_outputs in [*self._full_pages[place], self._page(place)]:
            step, end = max(first_step, page_step), min(end_step, page_step + len(page_inputs))
            if step < end:
                its_own = slice(step - page_step, end - page_step)
                _check_are_the_same(
                    step, inputs[step - first_step : end - first_step], page_inputs[its_own], next_step
                )
                outputs.append(page_outputs[its_own])
        return np.concatenate(outputs)

    def _page(self, place: int) -> _Page:
        """The page being written, without a copy."""
        first_step = self._page_step.one[place]
        num_steps = self.next_step.one[place] - first_step
        return first_step, self._inputs[place, :num_steps], self._outputs[place, :num_steps]

    def _turn_page(self, place: int) -> None:
        """Keep the page being written, and begin another."""
        first_step, inputs, outputs = self._page(place)
        self._keep(place, (first_step, inputs.copy(), outputs.copy()))
        self._page_step.one[place] = self.next_step.one[place]

    def _keep(self, place: int, page: _Page) -> None:
        """Keep a page, and forget those that the window has left."""
        pages, oldest_step = self._full_pages[place], self.oldest_step(place)
        pages.append(page)
        while len(pages) > 1 and pages[1][0] <= oldest_step:
            del pages[0]


def _check_are_the_same(first_step: int, inputs: Array, those_that_ran: Array, next_step: int) -> None:
    """That inputs [T, ...] from a step on are those that ran, bit for bit."""
    for step, one, one_that_ran in zip(
        range(first_step, first_step + len(inputs)), inputs, those_that_ran, strict=True
    ):
        if one.tobytes() != one_that_ran.tobytes():
            raise InputMismatchError(step, next_step)
