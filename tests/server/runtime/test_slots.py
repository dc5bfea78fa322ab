"""The slot pool alone."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.runtime.runner import INITIAL_SLOT, NUM_RESERVED_SLOTS
from server.runtime.slots import SlotPool

NUM_SLOTS = 5


class Slots(RuleBasedStateMachine):
    """Random takes, holds and releases, against a list with one entry for each time a slot is held."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(NUM_SLOTS)
        self.held: list[int] = []

    @rule()
    def take(self) -> None:
        if len(set(self.held)) < NUM_SLOTS:
            slot = self.pool.take()
            assert slot not in self.held
            assert NUM_RESERVED_SLOTS <= slot < NUM_SLOTS + NUM_RESERVED_SLOTS
            self.held.append(slot)

    @rule(data=st.data())
    def take_many(self, data: st.DataObject) -> None:
        num_slots = data.draw(st.integers(0, NUM_SLOTS - len(set(self.held))))
        slots = self.pool.take_many(num_slots).tolist()
        assert len(set(slots)) == num_slots
        assert not set(slots) & set(self.held)
        self.held += slots

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        if self.held:
            self.held.append(self.pool.hold(data.draw(st.sampled_from(self.held))))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            slot = data.draw(st.sampled_from(self.held))
            self.held.remove(slot)
            self.pool.release(slot)

    @rule(data=st.data())
    def release_many(self, data: st.DataObject) -> None:
        """Some of those held, and the same twice where it is held twice; the initial slot can be among them."""
        order = data.draw(st.permutations(self.held))
        num_slots = data.draw(st.integers(0, len(order)))
        slots, self.held = order[:num_slots], order[num_slots:]
        self.pool.release_many(np.array([*slots, INITIAL_SLOT] if num_slots % 2 else slots, np.int64))

    @invariant()
    def those_held_twice_are_shared(self) -> None:
        shared = {slot for slot in self.held if self.held.count(slot) > 1}
        assert self.pool.shared_many(np.array(self.held, np.int64)) == shared
        assert {slot for slot in self.held if self.pool.shared(slot)} == shared

    @invariant()
    def a_slot_is_used_as_long_as_somebody_holds_it(self) -> None:
        assert self.pool.num_used == len(set(self.held))


TestSlots = Slots.TestCase


def test_the_initial_slot_is_everybodys_and_never_runs_out() -> None:
    pool = SlotPool(1)

    for _ in range(3):
        assert pool.hold(INITIAL_SLOT) == INITIAL_SLOT
        pool.release(INITIAL_SLOT)

    assert pool.num_used == 0
