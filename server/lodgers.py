"""Lodgers: states that belong to a slot and are still in the seat where a run has left them.

A state is copied into its slot only when a run or somebody else is about to overwrite the seat, or somebody reads the
slot; what nobody needs any more is never copied. `engine.py` says which states those are.

A seat has a row in each of its table's two areas; a run reads those of one and writes those of the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from server.model_runner import ModelRunner


class Lodgers:
    """Who lodges in which row, of one runner's seats. Not thread-safe: the engine's thread owns it."""

    def __init__(self, runner: ModelRunner) -> None:
        """Nobody lodges anywhere."""
        self._runner = runner
        self._row_of: dict[int, int] = {}
        self._slot_in: dict[int, int] = {}

    def row_of(self, slot: int) -> int:
        """The row where a slot's state is: of a seat, or its own."""
        return self._row_of.get(slot, slot)

    def seats_of(self, slots: Sequence[int]) -> tuple[int, list[int]] | None:
        """The table, and the seats there, where its next run finds the states of some slots.

        None if it does not find all of them, each in its own: sessions that were forked from one another share a slot,
        and each needs a seat.
        """
        row_of = self._row_of
        if slots[0] not in row_of:
            return None
        table = self._runner.table_of(row_of[slots[0]])
        assert table is not None
        first = self._runner.first_seat(table)
        seats = [row_of.get(slot, -1) - first for slot in slots]
        is_found = min(seats) >= 0 and max(seats) < self._runner.num_seats
        return (table, seats) if is_found and len({*seats}) == len(seats) else None

    def add(self, table: int, seats: Iterable[int], slots: Sequence[int]) -> None:
        """Let states lodge in the seats where the table's last run has left them.

        What a slot's state was before, and may still lodge in another seat, is forgotten: else it would be copied over
        the new one when that seat is needed.
        """
        self.forget(slots)
        first = self._runner.first_seat(table)
        for seat, slot in zip(seats, slots, strict=True):
            self._slot_in[first + seat] = slot
            self._row_of[slot] = first + seat

    def forget(self, slots: Iterable[int]) -> None:
        """Nobody needs the states of these slots."""
        for slot in slots:
            row = self._row_of.pop(slot, None)
            if row is not None:
                del self._slot_in[row]

    def move_in(self, sources: Sequence[int], table: int, seats: Sequence[int]) -> None:
        """Copy the state in some rows to seats, for the table's next run; whoever lodges there goes to his slot."""
        first = self._runner.first_seat(table)
        self._copy([*sources], [first + seat for seat in seats], [first + seat for seat in seats])

    def make_room_for_run(self, table: int, num_rows: int) -> None:
        """Whoever lodges where the table's next run writes goes to his slot."""
        if self._slot_in:
            size = self._runner.padded_batch_size or num_rows
            first, next_first = self._runner.first_seat(table), self._runner.next_first_seat(table)
            self._copy(
                [], [], [*range(next_first, next_first + size), *range(first + num_rows, first + size)]
            )

    def move_out(self, slots: Collection[int] | None = None) -> None:
        """Copy states to these slots, or to all, if they are not there."""
        rows = self._row_of.values() if slots is None else [self.row_of(slot) for slot in slots]
        self._copy([], [], [*rows])

    def _copy(self, sources: list[int], targets: list[int], rows_to_leave: Iterable[int]) -> None:
        """Copy rows, and the lodgers of some rows to their slots, all at once: what is read, is read before."""
        leaving = [(row, self._slot_in[row]) for row in rows_to_leave if row in self._slot_in]
        sources += [row for row, _ in leaving]
        targets += [slot for _, slot in leaving]
        if sources:
            self._runner.move(np.array(sources), np.array(targets))
        self.forget([slot for _, slot in leaving])
