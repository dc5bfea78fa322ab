"""StateCache: states that belong to a slot and are still in the seat where a run has left them.

A state is copied into its slot only when a run or somebody else is about to overwrite the seat, or somebody reads the
slot; what nobody needs any more is never copied. `engine.py` says which states those are.

A run reads the rows of its table's area and writes those of the spare one, which then are the table's.

Shapes: B states.
"""

from __future__ import annotations

import numpy as np

from server.runtime.runner import INITIAL_SLOT, ModelRunner, Rows

# Who lodges where nobody does: the initial slot's state never lodges. It is 0, so `nonzero` finds those who do.
_NOBODY = INITIAL_SLOT
_NO_ROWS: Rows = np.empty(0, np.int64)


class StateCache:
    """Who lodges in which row, of one runner's seats. Not thread-safe: the engine's thread owns it."""

    def __init__(self, runner: ModelRunner) -> None:
        """Nobody lodges anywhere."""
        self._runner = runner
        self._row_of = np.arange(runner.num_rows)
        self._slot_in = np.full(runner.num_rows, _NOBODY)

    def rows_of(self, slots: Rows) -> Rows:
        """The rows where the states of slots [B] are: of a seat, or their own."""
        return self._row_of[slots]

    def add(self, rows: Rows, slots: Rows) -> None:
        """Let states lodge where a run has left them.

        What a slot's state was before, and may still lodge in another row, is forgotten: else it would be copied over
        the new one when that row is needed.

        Args:
            rows: [B], where nobody lodges any more.
            slots: [B], none twice, none the initial one.
        """
        self.forget(slots)
        self._slot_in[rows] = slots
        self._row_of[slots] = rows

    def forget(self, slots: Rows) -> None:
        """Nobody needs the states of these slots [B], unless they are in the slots themselves."""
        self._slot_in[self._row_of[slots]] = _NOBODY
        self._row_of[slots] = slots

    def move_in(self, sources: Rows, targets: Rows) -> None:
        """Copy the state in some rows [B] to others [B], of seats; whoever lodges there goes to his slot."""
        self._copy(targets[self._slot_in[targets] != _NOBODY], sources, targets)

    def make_room_for_run(self, table: int, num_rows: int) -> None:
        """Whoever lodges where the table's next run writes goes to his slot, and out of the rows that pad the batch."""
        size = self._runner.padded_batch_size or num_rows
        next_first = self._runner.spare_first_seat
        self._leave(next_first, next_first + size)
        if size > num_rows:
            first = self._runner.first_seat(table)
            self._leave(first + num_rows, first + size)

    def move_out(self, slots: Rows | None = None) -> None:
        """Copy states to these slots [B], or to all, if they are not there."""
        rows = self._slot_in.nonzero()[0] if slots is None else self._row_of[slots]
        leaving = rows[self._slot_in[rows] != _NOBODY]
        self._copy(np.unique(leaving))

    def _leave(self, start: int, stop: int) -> None:
        """Whoever lodges in these rows goes to his slot."""
        leaving = self._slot_in[start:stop].nonzero()[0]
        if len(leaving):
            self._copy(leaving + start)

    def _copy(self, leaving: Rows, sources: Rows = _NO_ROWS, targets: Rows = _NO_ROWS) -> None:
        """Copy the lodgers of some rows to their slots, and other rows, all at once: what is read, is read before."""
        slots = self._slot_in[leaving]
        sources, targets = np.concatenate([sources, leaving]), np.concatenate([targets, slots])
        if len(sources):
            self._runner.move(sources, targets)
        self.forget(slots)
