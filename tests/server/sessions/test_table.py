"""Who is in memory, who waits for an index, and who is evicted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.model import spec
from server.sessions import table as table_module
from server.sessions.table import SessionTable
from tests import step_models


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Any]:
    """Make a table; what is in it are strings here."""
    model = spec.load(step_models.write(tmp_path, step_models.accumulator()), "test", 1)
    return lambda num_sessions: SessionTable(num_sessions, model, retry_window_steps=16)


def admit(table: Any, session: str, last_use_s: float) -> int:
    """Take a index for an idle session."""
    index = table.take()
    assert index is not None
    table.session[index] = session
    use(table, index, last_use_s)
    return index


def use(table: Any, index: int, last_use_s: float) -> None:
    table.last_use_s.one[index], table.is_idle.one[index] = last_use_s, True


async def test_indices_are_taken_until_there_are_none(make: Callable[[int], Any]) -> None:
    table = make(2)

    assert [table.take(), table.take(), table.take()] == [0, 1, None]
    table.give_up(1)
    assert table.take() == 1


async def test_a_index_goes_to_whoever_waits_longest(make: Callable[[int], Any]) -> None:
    table = make(1)
    table.take()
    first, second = table.wait_for_index(), table.wait_for_index()

    table.give_up(0)

    assert (first.result(), second.done(), table.num_taken) == (0, False, 1)


async def test_who_has_stopped_waiting_is_passed_over(make: Callable[[int], Any]) -> None:
    table = make(1)
    table.take()
    first, second = table.wait_for_index(), table.wait_for_index()
    first.cancel()

    table.give_up(0)

    assert second.done()
    table.give_up(0)
    assert table.num_taken == 0


async def test_the_longest_idle_leaves_first_and_no_more_than_are_waited_for(
    make: Callable[[int], Any],
) -> None:
    table = make(3)
    a, _, _ = [admit(table, session, time_s) for time_s, session in enumerate("abc")]
    use(table, a, 3.0)
    assert table.next_to_evict() is None

    waiting = [table.wait_for_index(), table.wait_for_index()]
    left = []
    while (session := table.next_to_evict()) is not None:
        table.is_idle.one[table.session.index(session)] = False
        table.begins_to_leave()
        left.append(session)

    assert left == ["b", "c"]
    table.give_up(1)
    table.has_left()
    await asyncio.wait_for(waiting[0], 1)
    assert table.next_to_evict() is None


@pytest.mark.parametrize("num_sought", [1, 3, 256])
async def test_who_was_used_since_it_was_found_does_not_leave(
    num_sought: int, make: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are looked through only now and then, and what was found is held against what has happened since."""
    monkeypatch.setattr(table_module, "_NUM_SOUGHT", num_sought)
    table = make(6)
    for time_s, session in enumerate("abcdef"):
        admit(table, session, time_s)
    for _ in range(6):
        table.wait_for_index()
    left = []

    for time_s in range(10, 13):
        session = table.next_to_evict()
        assert session is not None
        table.is_idle.one[table.session.index(session)] = False
        left.append(session)
        if oldest := table.next_to_evict():
            use(table, table.session.index(oldest), time_s)

    assert left == ["a", "c", "e"]


async def test_the_idle_are_told_the_longest_unused_first(make: Callable[[int], Any]) -> None:
    table = make(4)
    indices = [
        admit(table, session, time_s) for session, time_s in [("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 0.0)]
    ]
    table.is_idle.one[indices[3]] = False

    assert table.idle(2.0) == ["b", "c"]
