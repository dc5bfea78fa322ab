"""Slots: which rows of a model's pools are in use.

A slot's content never changes while somebody holds it: a message writes a fresh one, and the session changes
over to it when the whole message has succeeded. That makes messages atomic without copying state, and a
slot that two sessions hold is a copy that costs nothing until one of them steps.
"""

from __future__ import annotations

import numpy as np

from server.runtime.columns import Column
from server.runtime.runner import INITIAL_SLOT, NUM_RESERVED_SLOTS, Rows

_NONE = frozenset[int]()


class SlotPool:
    """Counts who holds each slot; a slot that nobody holds is free."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = self._num_free = num_slots
        self._free = Column(num_slots, 0)
        self._free.each[:] = np.arange(num_slots + NUM_RESERVED_SLOTS - 1, NUM_RESERVED_SLOTS - 1, -1)
        """A stack: those from `_num_free` on are in use."""
        self._num_holders = Column(num_slots + NUM_RESERVED_SLOTS, 0)

    @property
    def num_used(self) -> int:
        """Slots that somebody holds."""
        return self._num_slots - self._num_free

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return self._num_free

    def take(self) -> int:
        """A free slot, held once. There is always one: the pool is made as large as its users can need."""
        self._num_free -= 1
        slot: int = self._free.one[self._num_free]
        self._num_holders.one[slot] = 1
        return slot

    def take_many(self, num_slots: int) -> Rows:
        """As `take`, several at once."""
        assert num_slots <= self._num_free
        self._num_free -= num_slots
        slots = self._free.each[self._num_free : self._num_free + num_slots].copy()
        self._num_holders.each[slots] = 1
        return slots

    def hold(self, slot: int) -> int:
        """Hold a slot once more; the initial slot is everybody's and is not counted."""
        if slot != INITIAL_SLOT:
            assert self._num_holders.one[slot]
            self._num_holders.one[slot] += 1
        return slot

    def shared(self, slot: int) -> frozenset[int]:
        """A slot, if it is held more than once."""
        return frozenset([slot]) if self._num_holders.one[slot] > 1 else _NONE

    def shared_many(self, slots: Rows) -> frozenset[int]:
        """Those of several slots that are held more than once."""
        return frozenset(slots[self._num_holders.each[slots] > 1].tolist())

    def release(self, slot: int) -> None:
        """Hold a slot once less."""
        if slot == INITIAL_SLOT:
            return
        num_left = self._num_holders.one[slot] - 1
        assert num_left >= 0
        self._num_holders.one[slot] = num_left
        if not num_left:
            self._free.one[self._num_free] = slot
            self._num_free += 1

    def release_many(self, slots: Rows) -> None:
        """As `release`, for several at once; one that is there twice is released twice."""
        if (self._num_holders.each[slots] == 1).all():  # so none of them is there twice
            self._num_holders.each[slots] = 0
            self._free.each[self._num_free : self._num_free + len(slots)] = slots
            self._num_free += len(slots)
        else:
            for slot in slots.tolist():
                self.release(slot)
