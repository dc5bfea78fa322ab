"""Slots: which rows of a model's pools are in use.

A slot's content never changes while somebody holds it: a message writes a fresh one, and the session changes
over to it when the whole message has succeeded. That makes messages atomic without copying state, and a
slot that two sessions hold is a copy that costs nothing until one of them steps.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.model_runner import INITIAL_SLOT, NUM_RESERVED_SLOTS


class SlotPool:
    """Counts who holds each slot; a slot that nobody holds is free."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots + NUM_RESERVED_SLOTS - 1, NUM_RESERVED_SLOTS - 1, -1))
        self._num_slots = num_slots
        self._num_holders = [0] * (num_slots + NUM_RESERVED_SLOTS)

    @property
    def num_used(self) -> int:
        """Slots that somebody holds."""
        return self._num_slots - len(self._free)

    def take(self) -> int:
        """A free slot, held once. There is always one: the pool is made as large as its users can need."""
        slot = self._free.pop()
        self._num_holders[slot] = 1
        return slot

    def hold(self, slot: int) -> int:
        """Hold a slot once more; the initial slot is everybody's and is not counted."""
        if slot != INITIAL_SLOT:
            assert self._num_holders[slot]
            self._num_holders[slot] += 1
        return slot

    def shared(self, slots: Iterable[int]) -> frozenset[int]:
        """Those of some slots that are held more than once."""
        num_holders = self._num_holders
        return frozenset([slot for slot in slots if num_holders[slot] > 1])

    def release(self, slot: int) -> None:
        """Hold a slot once less."""
        self.release_many([slot])

    def release_many(self, slots: Iterable[int]) -> None:
        """As `release`, for several at once."""
        num_holders, free = self._num_holders, self._free
        for slot in slots:
            if slot == INITIAL_SLOT:
                continue
            num_left = num_holders[slot] - 1
            assert num_left >= 0
            num_holders[slot] = num_left
            if not num_left:
                free.append(slot)
