"""Retry window: how far each session of a model has come, what was answered, and where it was reset.

It is what makes a repeated request safe: the steps that have run already are answered from here, however the repeat
cuts them into requests, and everything that does not fit is refused with the session's counter.

The counters and the last few steps of all sessions are columns, at their index in the session table, so that a step of
many sessions is on record after one operation for all of them.

Shapes: S sessions, T steps of a request, W steps of the window, P steps of a page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from server.errors import InputMismatchError, StepGapError, StepTooOldError
from server.model.layout import Steps
from server.runtime.columns import Column
from server.runtime.runner import Rows

_PAGE_STEPS = 16

_Page = tuple[int, Steps, Steps]
"""Index of the first step; inputs and outputs. The garbage collector soon skips a plain tuple."""


class RetryWindows:
    """The inputs and outputs of each session's last W steps, or of all, where there were fewer.

    They are on pages. The one being written, of P steps, is a row of arrays that all sessions share. A full one is
    copied, and kept with its session as long as the window reaches into it, so a session takes no more memory than its
    steps need. A message as long as a page is one.
    """

    def __init__(
        self,
        num_sessions: int,
        input_dtype: np.dtype[Any],
        output_dtype: np.dtype[Any],
        window_steps: int,
    ) -> None:
        """Nothing is on record.

        Args:
            num_sessions: how many there can be.
            input_dtype: of a step's inputs, all of them.
            output_dtype: of its outputs.
            window_steps: W.
        """
        self.next_step = Column(num_sessions, 0)
        """The session's counter: it only grows."""
        self._first_step = Column(num_sessions, 0)
        self._page_step = Column(num_sessions, 0)
        """Where the page being written begins."""
        self._inputs = np.zeros((num_sessions, _PAGE_STEPS), input_dtype)
        self._outputs = np.zeros((num_sessions, _PAGE_STEPS), output_dtype)
        self._no_outputs = np.empty(0, output_dtype)
        self._full_pages: dict[int, list[_Page]] = {}
        self._reset_steps: dict[int, tuple[int, ...]] = {}
        self._window_steps = window_steps

    def begin(self, index: int, next_step: int, reset_steps: Iterable[int] = ()) -> None:
        """Begin a record at an index, with nothing on record but where the session was reset."""
        self.next_step.one[index] = self._first_step.one[index] = self._page_step.one[index] = next_step
        self._full_pages[index] = []
        self._reset_steps[index] = tuple(reset_steps)

    def end(self, index: int) -> None:
        """Forget the record at an index."""
        del self._full_pages[index], self._reset_steps[index]

    def oldest_step(self, index: int) -> int:
        """The first step whose answer is still recorded."""
        return max(self._first_step.one[index], self.next_step.one[index] - self._window_steps)

    def add(self, index: int, inputs: Steps, outputs: Steps) -> None:
        """Record a request that was applied, [T] each, and forget what is older than the window."""
        num_steps, step = len(inputs), self.next_step.one[index]
        row = step - self._page_step.one[index]
        if row and row + num_steps > _PAGE_STEPS:
            self._turn_page(index)
            row = 0
        if num_steps < _PAGE_STEPS:
            self._inputs[index, row : row + num_steps] = inputs
            self._outputs[index, row : row + num_steps] = outputs
            self.next_step.one[index] = step + num_steps
            if row + num_steps == _PAGE_STEPS:
                self._turn_page(index)
        else:
            self.next_step.one[index] = self._page_step.one[index] = step + num_steps
            # Copies: these may be parts of arrays of a whole batch, which one session is not to keep.
            self._keep(index, (step, inputs.copy(), outputs.copy()))

    def add_each(self, indices: Rows, inputs: Steps, outputs: Steps) -> None:
        """As `add`, for sessions at several indices [S], none twice: inputs and outputs [S, T]."""
        if inputs.shape[1] == 1:
            steps = self.next_step.each[indices]
            rows = steps - self._page_step.each[indices]
            self._inputs[indices, rows] = inputs[:, 0]
            self._outputs[indices, rows] = outputs[:, 0]
            self.next_step.each[indices] = steps + 1
            for index in indices[rows == _PAGE_STEPS - 1].tolist():
                self._turn_page(index)
        else:
            for index, session_inputs, session_outputs in zip(indices.tolist(), inputs, outputs, strict=True):
                self.add(index, session_inputs, session_outputs)

    def reset_steps(self, index: int) -> tuple[int, ...]:
        """Where the session was reset, as far as that is on record."""
        resets = self._reset_steps[index]
        if resets and resets[0] < (oldest := self.oldest_step(index)):
            self._reset_steps[index] = resets = tuple(step for step in resets if step >= oldest)
        return resets

    def add_reset(self, index: int) -> None:
        """Record a reset at the present step."""
        self._reset_steps[index] = (*self.reset_steps(index), self.next_step.one[index])

    def was_reset_at(self, index: int, step: int) -> bool:
        """Whether a reset at this step is on record."""
        return step in self.reset_steps(index)

    def check_is_at(self, index: int, step: int) -> None:
        """That the counter is at a step.

        Raises:
            StepGapError: it has not come there. StepTooOldError: it is past it.
        """
        next_step = self.next_step.one[index]
        if step > next_step:
            raise StepGapError(step, next_step)
        if step < next_step:
            raise StepTooOldError(step, next_step, next_step)

    def outputs_of(self, index: int, inputs: Steps, first_step: int | None) -> Steps:
        """The outputs [K] of the first K of some inputs, those that have run; K may be 0.

        Args:
            index: the session's.
            inputs: [T].
            first_step: index of the first, or None for the next step.

        Raises:
            StepGapError: it is beyond the counter. StepTooOldError: it is before the window.
            InputMismatchError: a step has run with other bytes.
        """
        next_step = self.next_step.one[index]
        if first_step is None or first_step == next_step:
            return self._no_outputs
        if first_step > next_step:
            raise StepGapError(first_step, next_step)
        if first_step < (oldest := self.oldest_step(index)):
            raise StepTooOldError(first_step, oldest, next_step)
        end_step = min(first_step + len(inputs), next_step)
        outputs = [self._no_outputs]
        for page_step, page_inputs, page_outputs in [*self._full_pages[index], self._page(index)]:
            step, end = max(first_step, page_step), min(end_step, page_step + len(page_inputs))
            if step < end:
                part = slice(step - page_step, end - page_step)
                _check_are_the_same(
                    step, inputs[step - first_step : end - first_step], page_inputs[part], next_step
                )
                outputs.append(page_outputs[part])
        return np.concatenate(outputs)

    def _page(self, index: int) -> _Page:
        """The page being written, without a copy."""
        first_step = self._page_step.one[index]
        num_steps = self.next_step.one[index] - first_step
        return first_step, self._inputs[index, :num_steps], self._outputs[index, :num_steps]

    def _turn_page(self, index: int) -> None:
        """Keep the page being written, and begin another."""
        first_step, inputs, outputs = self._page(index)
        self._keep(index, (first_step, inputs.copy(), outputs.copy()))
        self._page_step.one[index] = self.next_step.one[index]

    def _keep(self, index: int, page: _Page) -> None:
        """Keep a page, and forget those that the window has left."""
        pages, oldest_step = self._full_pages[index], self.oldest_step(index)
        pages.append(page)
        while len(pages) > 1 and pages[1][0] <= oldest_step:
            del pages[0]


def _check_are_the_same(first_step: int, inputs: Steps, ran: Steps, next_step: int) -> None:
    """That inputs [T] from a step on are those that ran, bit for bit."""
    for step, one, ran_step in zip(range(first_step, first_step + len(inputs)), inputs, ran, strict=True):
        if one.tobytes() != ran_step.tobytes():
            raise InputMismatchError(step, next_step)
