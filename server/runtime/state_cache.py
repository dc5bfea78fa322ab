"""State cache: states that belong to a slot and are still in the batch row where a run has left them.

It writes back late: a state is copied into its slot only when a run or another state is about to overwrite the batch
row, or somebody reads the slot; what nobody needs any more is never copied. `engine.py` says which states those are.

A run reads the rows of its bank's front buffer and writes those of the spare one, which then is the bank's.

Shapes: B states.
"""

from __future__ import annotations

import numpy as np

from server.runtime.runner import INITIAL_SLOT, ModelRunner, Rows

# Which slot's state is in a row that has none: the initial one's, which is never cached. It is 0, for `nonzero`.
_NONE = INITIAL_SLOT
_NO_ROWS: Rows = np.empty(0, np.int64)


class StateCache:
    """Which slot's state is in which batch row of a runner. Not thread-safe: the engine's thread owns it."""

    def __init__(self, runner: ModelRunner) -> None:
        """Every state is in its slot."""
        self._runner = runner
        self._row_of = np.arange(runner.num_rows)
        self._slot_in = np.full(runner.num_rows, _NONE)

    def rows_of(self, slots: Rows) -> Rows:
        """The pool rows where the states of slots [B] are: batch rows, or the slots' own."""
        return self._row_of[slots]

    def add(self, rows: Rows, slots: Rows) -> None:
        """Let states stay where a run has left them.

        What a slot's state was before, and may still be cached in another row, is forgotten: else it would be copied
        over the new one when that row is needed.

        Args:
            rows: [B], in which nothing is cached any more.
            slots: [B], none twice, none the initial one.
        """
        self.forget(slots)
        self._slot_in[rows] = slots
        self._row_of[slots] = rows

    def forget(self, slots: Rows) -> None:
        """Nobody needs the states of these slots [B], unless they are in the slots themselves."""
        self._slot_in[self._row_of[slots]] = _NONE
        self._row_of[slots] = slots

    def load(self, sources: Rows, targets: Rows) -> None:
        """Copy the state in some pool rows [B] to batch rows [B]; what is cached there is written back."""
        self._copy(targets[self._slot_in[targets] != _NONE], sources, targets)

    def make_room_for_run(self, bank: int, num_rows: int) -> None:
        """Write back what is cached where the bank's next run writes, and in the rows that pad the batch."""
        size = self._runner.padded_batch_size or num_rows
        next_first = self._runner.spare_first_row
        self._write_back_rows(next_first, next_first + size)
        if size > num_rows:
            first = self._runner.first_batch_row(bank)
            self._write_back_rows(first + num_rows, first + size)

    def write_back(self, slots: Rows | None = None) -> None:
        """Copy the states of these slots [B], or of all, to their slots, where they are not there."""
        rows = self._slot_in.nonzero()[0] if slots is None else self._row_of[slots]
        cached = rows[self._slot_in[rows] != _NONE]
        self._copy(np.unique(cached))

    def _write_back_rows(self, start: int, stop: int) -> None:
        cached = self._slot_in[start:stop].nonzero()[0]
        if len(cached):
            self._copy(cached + start)

    def _copy(self, cached: Rows, sources: Rows = _NO_ROWS, targets: Rows = _NO_ROWS) -> None:
        """Write back what is cached in some rows, and copy other rows, all at once: what is read, is read before."""
        slots = self._slot_in[cached]
        sources, targets = np.concatenate([sources, cached]), np.concatenate([targets, slots])
        if len(sources):
            self._runner.move(sources, targets)
        self.forget(slots)
