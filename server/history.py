"""History: how far a session has come, what was answered, and where it was reset.

It is what makes a repeated message safe: the steps that have run already are answered from here, however the
repeat cuts them into messages, and everything that does not fit is refused with the session's counter.
`sessions.py` keeps one for each session.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from ntm.tensor import Array
from server.errors import InputMismatchError, StepGapError, StepTooOldError


class _Record(NamedTuple):
    """A message that was applied."""

    first_step: int
    inputs: Array
    outputs: Array

    @property
    def end_step(self) -> int:
        return self.first_step + len(self.inputs)


class History:
    """The records of one session, for at least the last `window_steps` steps."""

    def __init__(self, no_outputs: Array, window_steps: int, next_step: int = 0) -> None:
        """A history that begins at `next_step`, with nothing on record.

        Args:
            no_outputs: [0, ...output shape], the outputs of no steps.
            window_steps: steps to keep at least.
            next_step: the counter.
        """
        self.next_step = next_step
        """The session's counter: it only grows."""
        self._window_steps = window_steps
        self._records: deque[_Record] = deque()
        self._no_outputs = no_outputs
        self._reset_steps: deque[int] = deque()

    @property
    def oldest_step(self) -> int:
        """The first step whose answer is still recorded."""
        return self._records[0].first_step if self._records else self.next_step

    def add(self, inputs: Array, outputs: Array) -> None:
        """Record a message that was applied, and forget what is older than the window."""
        self._records.append(_Record(self.next_step, inputs, outputs))
        self.next_step += len(inputs)
        while self._records[0].end_step <= self.next_step - self._window_steps:
            self._records.popleft()
        while self._reset_steps and self._reset_steps[0] < self.oldest_step:
            self._reset_steps.popleft()

    def add_reset(self) -> None:
        """Record a reset at the present step."""
        self._reset_steps.append(self.next_step)

    def was_reset_at(self, step: int) -> bool:
        """Whether a reset at this step is on record."""
        return step in self._reset_steps

    def check_is_at(self, step: int) -> None:
        """That the counter is at a step.

        Raises:
            StepGapError: it has not come there. StepTooOldError: it is past it.
        """
        if step > self.next_step:
            raise StepGapError(step, self.next_step)
        if step < self.next_step:
            raise StepTooOldError(step, self.next_step, self.next_step)

    def outputs_of(self, inputs: Array, first_step: int | None) -> Array:
        """The outputs [K, ...output shape] of the first K of some inputs, those that have run; K may be 0.

        Args:
            inputs: [T, ...input shape].
            first_step: index of the first, or None for the next step.

        Raises:
            StepGapError: it is beyond the counter. StepTooOldError: it is before the window.
            InputMismatchError: a step has run with other bytes.
        """
        if first_step is None or first_step == self.next_step:
            return self._no_outputs
        if first_step > self.next_step:
            raise StepGapError(first_step, self.next_step)
        if first_step < self.oldest_step:
            raise StepTooOldError(first_step, self.oldest_step, self.next_step)
        known = [self._no_outputs]
        end_step = min(first_step + len(inputs), self.next_step)
        for record in self._records:
            start, end = max(first_step, record.first_step), min(end_step, record.end_step)
            if start >= end:
                continue
            sent = inputs[start - first_step : end - first_step]
            ran = record.inputs[start - record.first_step : end - record.first_step]
            for step, row, row_that_ran in zip(range(start, end), sent, ran, strict=True):
                if row.tobytes() != row_that_ran.tobytes():
                    raise InputMismatchError(step, self.next_step)
            known.append(record.outputs[start - record.first_step : end - record.first_step])
        return np.concatenate(known)
