"""Who is in memory, who waits for a place, and who has to go."""

from __future__ import annotations

import asyncio

import pytest

from server.sessions import table as room_module
from server.sessions.table import Room

StringRoom = Room[str, str]


def sit(room: StringRoom, session: str, last_use_s: float) -> int:
    """Take a place for an idle session."""
    place = room.take()
    assert place is not None
    room.session[place] = session
    use(room, place, last_use_s)
    return place


def use(room: StringRoom, place: int, last_use_s: float) -> None:
    room.last_use_s.one[place], room.is_idle.one[place] = last_use_s, True


async def test_places_are_taken_until_there_are_none() -> None:
    room = StringRoom(2)

    assert [room.take(), room.take(), room.take()] == [0, 1, None]
    room.give_up(1)
    assert room.take() == 1


async def test_a_place_goes_to_whoever_waits_longest() -> None:
    room = StringRoom(1)
    room.take()
    first, second = room.line_up(), room.line_up()

    room.give_up(0)

    assert (first.result(), second.done(), room.num_taken) == (0, False, 1)


async def test_who_has_stopped_waiting_is_passed_over() -> None:
    room = StringRoom(1)
    room.take()
    first, second = room.line_up(), room.line_up()
    first.cancel()

    room.give_up(0)

    assert second.done()
    room.give_up(0)
    assert room.num_taken == 0


async def test_the_longest_idle_leaves_first_and_no_more_than_are_waited_for() -> None:
    room = StringRoom(3)
    a, _, _ = [sit(room, session, time_s) for time_s, session in enumerate("abc")]
    use(room, a, 3.0)
    assert room.next_to_leave() is None

    waiting = [room.line_up(), room.line_up()]
    left = []
    while (session := room.next_to_leave()) is not None:
        room.is_idle.one[room.session.index(session)] = False
        room.begins_to_leave()
        left.append(session)

    assert left == ["b", "c"]
    room.give_up(1)
    room.has_left()
    await asyncio.wait_for(waiting[0], 1)
    assert room.next_to_leave() is None


@pytest.mark.parametrize("num_sought", [1, 3, 256])
async def test_who_was_used_since_it_was_found_does_not_leave(
    num_sought: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are looked through only now and then, and what was found is held against what has happened since."""
    monkeypatch.setattr(room_module, "_NUM_SOUGHT", num_sought)
    room = StringRoom(6)
    for time_s, session in enumerate("abcdef"):
        sit(room, session, time_s)
    for _ in range(6):
        room.line_up()
    left = []

    for time_s in range(10, 13):
        session = room.next_to_leave()
        assert session is not None
        room.is_idle.one[room.session.index(session)] = False
        left.append(session)
        if oldest := room.next_to_leave():
            use(room, room.session.index(oldest), time_s)

    assert left == ["a", "c", "e"]


async def test_the_idle_are_told_the_longest_unused_first() -> None:
    room = StringRoom(4)
    places = [
        sit(room, session, time_s) for session, time_s in [("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 0.0)]
    ]
    room.is_idle.one[places[3]] = False

    assert room.idle(2.0) == ["b", "c"]
