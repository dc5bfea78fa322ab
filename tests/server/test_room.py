"""Who is in memory, who waits for a place, and who has to go."""

from __future__ import annotations

import asyncio

from server.room import Room


async def test_places_are_taken_until_there_are_none() -> None:
    room: Room[str] = Room(2)

    assert [room.take(), room.take(), room.take()] == [True, True, False]
    room.give_up()
    assert room.take()


async def test_a_place_goes_to_whoever_waits_longest() -> None:
    room: Room[str] = Room(1)
    room.take()
    first, second = room.line_up(), room.line_up()

    room.give_up()

    assert (first.done(), second.done(), room.num_taken) == (True, False, 1)


async def test_who_has_stopped_waiting_is_passed_over() -> None:
    room: Room[str] = Room(1)
    room.take()
    first, second = room.line_up(), room.line_up()
    first.cancel()

    room.give_up()

    assert second.done()
    room.give_up()
    assert room.num_taken == 0


async def test_the_longest_idle_leaves_first_and_no_more_than_are_waited_for() -> None:
    room: Room[str] = Room(3)
    for session in "abc":
        room.take()
        room.rest([session])
    room.wake(["a"])
    room.rest(["a"])
    assert room.next_to_leave() is None

    waiting = [room.line_up(), room.line_up()]
    left = []
    while (session := room.next_to_leave()) is not None:
        room.wake([session])
        room.begins_to_leave()
        left.append(session)

    assert left == ["b", "c"]
    room.give_up()
    room.has_left()
    await asyncio.wait_for(waiting[0], 1)
    assert room.next_to_leave() is None
