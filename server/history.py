"""History: how far a session has come, what was answered, and where it was reset.

It is what makes a repeated message safe: the steps that have run already are answered from here, however the
repeat cuts them into messages, and everything that does not fit is refused with the session's counter.
`sessions.py` keeps one for each session.

Shapes: T steps of a message, W steps of the window.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ntm.tensor import Array
from server.errors import InputMismatchError, StepGapError, StepTooOldError

# Steps there is room for at first; it doubles up to the window.
_FIRST_CAPACITY = 16


class History:
    """The inputs and outputs of one session's last W steps, or of all, where there were fewer.

    Step k has row k mod the capacity of two arrays, which grow up to W rows: no object for each message, of which there
    can be a thousand in every session.
    """

    __slots__ = ("_first_step", "_inputs", "_outputs", "_window_steps", "next_step", "reset_steps")

    def __init__(
        self,
        no_inputs: Array,
        no_outputs: Array,
        window_steps: int,
        next_step: int = 0,
        reset_steps: Iterable[int] = (),
    ) -> None:
        """A history that begins at `next_step`, with nothing on record.

        Args:
            no_inputs: [0, ...input shape], the inputs of no steps.
            no_outputs: [0, ...output shape], the outputs of no steps.
            window_steps: W.
            next_step: the counter.
            reset_steps: where the session was reset, as far as that is on record.
        """
        self.next_step = next_step
        """The session's counter: it only grows."""
        self._first_step = next_step
        self._window_steps = window_steps
        self._inputs = no_inputs
        self._outputs = no_outputs
        self.reset_steps = tuple(reset_steps)
        """Where the session was reset, as far as that is on record."""

    @property
    def oldest_step(self) -> int:
        """The first step whose answer is still recorded."""
        return max(self._first_step, self.next_step - self._window_steps)

    def add(self, inputs: Array, outputs: Array) -> None:
        """Record a message that was applied, T at most W, and forget what is older than the window."""
        num_steps = len(inputs)
        end_step = self.next_step + num_steps
        capacity = len(self._inputs)
        if capacity < self._window_steps and capacity < end_step - self._first_step:
            capacity = self._grow(end_step - self._first_step)
        start = self.next_step % capacity
        end = start + num_steps
        if end <= capacity:
            self._inputs[start:end] = inputs
            self._outputs[start:end] = outputs
        else:
            rows = np.arange(start, end) % capacity
            self._inputs[rows] = inputs
            self._outputs[rows] = outputs
        self.next_step = end_step
        if self.reset_steps and self.reset_steps[0] < self.oldest_step:
            self.reset_steps = tuple(step for step in self.reset_steps if step >= self.oldest_step)

    def add_reset(self) -> None:
        """Record a reset at the present step."""
        self.reset_steps = (*self.reset_steps, self.next_step)

    def was_reset_at(self, step: int) -> bool:
        """Whether a reset at this step is on record."""
        return step in self.reset_steps

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
            return self._outputs[:0]
        if first_step > self.next_step:
            raise StepGapError(first_step, self.next_step)
        if first_step < self.oldest_step:
            raise StepTooOldError(first_step, self.oldest_step, self.next_step)
        end_step = min(first_step + len(inputs), self.next_step)
        rows = np.arange(first_step, end_step) % len(self._inputs)
        for step, row, row_that_ran in zip(
            range(first_step, end_step), inputs, self._inputs[rows], strict=False
        ):
            if row.tobytes() != row_that_ran.tobytes():
                raise InputMismatchError(step, self.next_step)
        return np.asarray(self._outputs[rows])

    def _grow(self, num_steps: int) -> int:
        """Make room for so many steps since the first, or for the window; returns the capacity."""
        capacity = min(self._window_steps, max(2 * len(self._inputs), num_steps, _FIRST_CAPACITY))
        steps = np.arange(self.oldest_step, self.next_step)
        for name in ("_inputs", "_outputs"):
            old = getattr(self, name)
            new = np.zeros((capacity, *old.shape[1:]), old.dtype)
            if len(steps):
                new[steps % capacity] = old[steps % len(old)]
            setattr(self, name, new)
        return capacity
