"""Sessions through a real server: creation, listing, reset, fork, deletion, and ids that are never used twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest

from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from server.sessions import manager as sessions
from server.storage.async_store import AsyncStore
from tests.server.helpers import (
    EXHAUSTED,
    GONE,
    INVALID,
    ORDER,
    TAKEN,
    Caller,
    Start,
    accumulated,
    pending,
    random_inputs,
    refused,
)


async def delete(caller: Caller, session_id: str = "s", allow_missing: bool = False) -> None:
    await caller.stub.DeleteSession(
        pb.DeleteSessionRequest(session_id=session_id, allow_missing=allow_missing)
    )


async def reset(caller: Caller, at_step: int | None = None) -> int:
    request = pb.ResetSessionRequest(session_id="s", at_step=at_step)
    return (await caller.stub.ResetSession(request)).session.next_step


async def test_a_new_session_says_what_it_is(caller: Caller) -> None:
    session = await caller.create("accumulator", "my-session")

    assert (session.session_id, session.model_name, session.model_version) == ("my-session", "accumulator", 1)
    assert session.next_step == 0
    assert session.store == caller.server.sessions.store.backend.kind
    assert not session.HasField("expire_time")


async def test_the_server_makes_an_id_that_nobody_can_guess_when_none_is_sent(caller: Caller) -> None:
    first = await caller.create("accumulator", "")
    second = await caller.create("accumulator", "")

    assert first.session_id != second.session_id
    assert len(first.session_id) == 32


async def test_an_unknown_model_or_version_is_not_found(caller: Caller) -> None:
    await refused(caller.create("nothing"), GONE, "MODEL_NOT_FOUND")
    await refused(caller.create("very long " * 2000), GONE, "MODEL_NOT_FOUND")
    await refused(caller.create("accumulator", model_version=7), GONE, "MODEL_NOT_FOUND")


async def test_an_id_that_is_taken_is_refused(caller: Caller) -> None:
    await caller.create("accumulator", request_id="r1")

    await refused(caller.create("accumulator"), TAKEN, "SESSION_EXISTS")
    await refused(caller.create("accumulator", request_id="r2"), TAKEN, "SESSION_EXISTS")


async def test_a_repeated_creation_gives_the_same_session_as_it_has_become(caller: Caller) -> None:
    first = await caller.create("accumulator", "", request_id="r")
    await caller.step(random_inputs(3), first.session_id)

    again = await caller.create("accumulator", "", request_id="r")

    assert (again.session_id, again.next_step) == (first.session_id, 3)


async def test_a_request_id_that_made_another_session_is_refused(caller: Caller) -> None:
    await caller.create("accumulator", "s", request_id="r")

    await refused(caller.create("accumulator", "other", request_id="r"), TAKEN, "REQUEST_ID_REUSED")
    await refused(caller.create("delay_line", "s", request_id="r"), TAKEN, "REQUEST_ID_REUSED")


async def test_a_request_id_of_another_kind_of_request_is_refused(caller: Caller) -> None:
    await caller.create("accumulator", "a", request_id="q")
    await caller.create("accumulator", "b")

    fork_b = pb.ForkSessionRequest(source_session_id="b", request_id="q")
    await refused(caller.stub.ForkSession(fork_b), TAKEN, "REQUEST_ID_REUSED")
    await caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="a", request_id="f"))
    fork_b.request_id = "f"
    await refused(caller.stub.ForkSession(fork_b), TAKEN, "REQUEST_ID_REUSED")


async def test_a_fork_repeated_while_the_first_still_waits_makes_one_session(caller: Caller) -> None:
    await caller.create("accumulator")
    request = pb.ForkSessionRequest(source_session_id="s", request_id="r")
    with caller.hold("accumulator"):
        step = asyncio.ensure_future(caller.step(random_inputs(1)))
        await pending(caller, "accumulator", 1)
        forks = [asyncio.ensure_future(caller.stub.ForkSession(request)) for _ in range(2)]
        await pending(caller, "accumulator", 3)

    await step
    first, second = await asyncio.gather(*forks)
    assert first.session.session_id == second.session.session_id


async def test_what_is_remembered_of_sessions_that_ended_is_forgotten_in_time(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(5):
        await caller.create("accumulator", f"s{index}", request_id=f"r{index}")
        await delete(caller, f"s{index}")
    journal = caller.server.sessions.store
    assert await journal.find_request("r0") is not None

    in_the_future(monkeypatch, journal, sessions.RETIREMENT_S + 1)
    await caller.server.sessions.purge()

    assert [await journal.look(f"s{index}") for index in range(5)] == [None] * 5
    assert await journal.find_request("r0") is None


async def test_what_is_remembered_of_a_session_is_bounded_by_the_retry_window(caller: Caller) -> None:
    await caller.create("accumulator")
    for _ in range(50):
        await caller.step(random_inputs(1))
        await reset(caller)

    session = caller.server.sessions.in_memory["s"]
    windows = session.table.retry_windows
    assert session.next_step - windows.oldest_step(session.index) == 16
    assert len(windows.reset_steps(session.index)) <= 17


async def test_an_unused_session_can_be_deleted_when_the_queue_is_full(caller: Caller) -> None:
    await caller.create("accumulator")
    await caller.create("accumulator", "idle")
    with caller.hold("accumulator"):
        waiting = [asyncio.ensure_future(caller.step(random_inputs(1))) for _ in range(6)]
        await pending(caller, "accumulator", 6)

        await delete(caller, "idle")

    await asyncio.gather(*waiting)


async def test_without_a_store_no_free_slot_is_refused_until_a_session_ends(caller: Caller) -> None:
    if caller.server.sessions.store.backend.keeps_steps:
        pytest.skip("with a store, sessions that wait there take no slot: see test_paging.py")
    for index in range(8):
        await caller.create("accumulator", f"s{index}")

    await refused(caller.create("accumulator"), EXHAUSTED, "NO_FREE_SLOT")
    await delete(caller, "s3")
    await caller.create("accumulator")


async def test_slots_are_given_back_however_messages_end(caller: Caller) -> None:
    """Success, failure, reset, withdrawal and deletion: the pool is as full as before."""
    served = caller.server.sessions.models.find("logarithm", None)
    for round_number in range(20):
        session_id = f"s{round_number}"
        await caller.create("logarithm", session_id)
        await caller.step(np.ones((2, 3), np.float32), session_id)
        await caller.stub.ResetSession(pb.ResetSessionRequest(session_id=session_id))
        await caller.step(np.ones((2, 3), np.float32), session_id)
        await refused(
            caller.step(np.full((2, 3), -9, np.float32), session_id),
            grpc.StatusCode.INTERNAL,
            "OUTPUT_NOT_FINITE",
        )
        with caller.hold("logarithm"):
            call = caller.stub.Step(
                pb.StepRequest(session_id=session_id, inputs=to_message(np.ones((1, 3), np.float32)))
            )
            await pending(caller, "logarithm", 1)
            call.cancel()
            await pending(caller, "logarithm", 0)
        await delete(caller, session_id)

    assert (served.slots.num_used, served.num_sessions, served.num_pending) == (0, 0, 0)


async def test_sessions_are_listed_in_pages_by_id(caller: Caller) -> None:
    for session_id in ("b", "d", "a", "c"):
        await caller.create("accumulator" if session_id != "c" else "delay_line", session_id)

    pages, token = [], ""
    for _ in range(3):
        request = pb.ListSessionsRequest(page_size=2, page_token=token)
        page = await caller.stub.ListSessions(request)
        pages.append([session.session_id for session in page.sessions])
        token = page.next_page_token
        if not token:
            break
    only = await caller.stub.ListSessions(pb.ListSessionsRequest(model_name="delay_line"))

    assert pages == [["a", "b"], ["c", "d"]]
    assert [session.session_id for session in only.sessions] == ["c"]


@pytest.mark.parametrize(
    "fields", [{"page_size": -1}, {"page_size": 1001}, {"page_token": "%"}, {"page_token": "ä"}]
)
async def test_a_bad_page_is_refused(caller: Caller, fields: dict[str, object]) -> None:
    told = await refused(caller.stub.ListSessions(pb.ListSessionsRequest(**fields)), INVALID, "INVALID_INPUT")

    assert told["field"] in fields


async def test_a_deleted_session_is_gone_and_its_id_is_retired(caller: Caller) -> None:
    await caller.create("accumulator", request_id="r")
    await delete(caller)

    await refused(caller.step(random_inputs(1)), GONE, "SESSION_NOT_FOUND")
    await refused(delete(caller), GONE, "SESSION_NOT_FOUND")
    await delete(caller, allow_missing=True)
    await refused(caller.create("accumulator"), TAKEN, "SESSION_ID_RETIRED")
    await refused(caller.create("accumulator", request_id="r"), TAKEN, "SESSION_ID_RETIRED")


async def test_a_retired_id_is_free_again_after_24_hours(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await caller.create("accumulator")
    await delete(caller)

    in_the_future(monkeypatch, caller.server.sessions.store, sessions.RETIREMENT_S + 1)
    await caller.server.sessions.purge()

    assert (await caller.create("accumulator")).next_step == 0


async def test_two_deletions_that_allow_a_missing_session_both_succeed(caller: Caller) -> None:
    await caller.create("accumulator")
    with caller.hold("accumulator"):
        step = asyncio.ensure_future(caller.step(random_inputs(1)))
        await pending(caller, "accumulator", 1)
        deletions = [asyncio.ensure_future(delete(caller, allow_missing=True)) for _ in range(2)]
        await pending(caller, "accumulator", 3)

    await asyncio.gather(step, *deletions)


async def test_deletion_waits_for_the_calls_before_it_and_refuses_those_after(caller: Caller) -> None:
    inputs = random_inputs(2)
    await caller.create("accumulator")
    with caller.hold("accumulator"):
        before = asyncio.ensure_future(caller.step(inputs))
        await pending(caller, "accumulator", 1)
        deletion = asyncio.ensure_future(delete(caller))
        await pending(caller, "accumulator", 2)
        after = asyncio.ensure_future(caller.step(inputs))
        await pending(caller, "accumulator", 3)

    np.testing.assert_array_equal(await before, accumulated(inputs))
    await deletion
    await refused(after, GONE, "SESSION_NOT_FOUND")


async def test_a_reset_goes_back_to_the_initial_state_and_keeps_the_counter(caller: Caller) -> None:
    inputs = random_inputs(3)
    await caller.create("accumulator")
    await caller.step(inputs)

    assert await reset(caller) == 3
    np.testing.assert_array_equal(await caller.step(inputs, first_step=3), accumulated(inputs))
    np.testing.assert_array_equal(await caller.step(inputs, first_step=0), accumulated(inputs))


async def test_a_repeated_reset_changes_nothing(caller: Caller) -> None:
    inputs = random_inputs(3)
    await caller.create("accumulator")
    await caller.step(inputs)
    await reset(caller, at_step=3)
    await caller.step(inputs)

    assert await reset(caller, at_step=3) == 6
    np.testing.assert_array_equal((await caller.state())["sum"], accumulated(inputs)[-1])


async def test_a_reset_at_another_step_is_refused(caller: Caller) -> None:
    await caller.create("accumulator")
    await caller.step(random_inputs(3))

    await refused(reset(caller, at_step=2), ORDER, "STEP_TOO_OLD")
    told = await refused(reset(caller, at_step=4), ORDER, "STEP_GAP")

    assert told["next_step"] == "3"


async def test_a_fork_is_an_exact_copy_and_independent_from_then_on(caller: Caller) -> None:
    inputs = random_inputs(8)
    await caller.create("accumulator")
    await caller.step(inputs[:4])
    request = pb.ForkSessionRequest(source_session_id="s", at_step=4, session_id="f", request_id="r")

    forked = (await caller.stub.ForkSession(request)).session
    again = (await caller.stub.ForkSession(request)).session
    source_outputs = await caller.step(inputs[4:6])
    await reset(caller)
    fork_outputs = await caller.step(inputs[4:], "f", first_step=4)

    assert (forked.next_step, again.session_id) == (4, "f")
    np.testing.assert_array_equal(source_outputs, accumulated(inputs)[4:6])
    np.testing.assert_array_equal(fork_outputs, accumulated(inputs)[4:])
    await refused(
        caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="s", at_step=1)),
        ORDER,
        "STEP_TOO_OLD",
    )


async def test_a_fork_holds_on_to_its_state_when_its_source_ends(caller: Caller) -> None:
    inputs = random_inputs(4)
    await caller.create("accumulator")
    await caller.step(inputs[:2])
    await caller.stub.ForkSession(pb.ForkSessionRequest(source_session_id="s", session_id="f"))
    await delete(caller)
    for index in range(5):
        await caller.create("accumulator", f"new{index}")
        await caller.step(random_inputs(2, index), f"new{index}")

    np.testing.assert_array_equal(await caller.step(inputs[2:], "f"), accumulated(inputs)[2:])


async def test_an_idle_session_expires_and_says_so(
    serve: Start, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = await serve(models, max_resident_sessions=2, idle_limit_s=3600)
    caller = Caller(server, address)
    await caller.create("accumulator", "idle")
    session = await caller.create("accumulator", "busy")
    assert session.HasField("expire_time")

    with caller.hold("accumulator"):
        step = asyncio.ensure_future(caller.step(random_inputs(1), "busy"))
        await pending(caller, "accumulator", 1)
        in_the_future(monkeypatch, server.sessions.store, 3601)
        await server.sessions.expire_idle()

    await step
    # A call's end counts as use, however long it took.
    await server.sessions.expire_idle()
    assert await caller.next_step("busy") == 1
    await refused(caller.step(random_inputs(1), "idle"), GONE, "SESSION_EXPIRED")
    await caller.channel.close()


def in_the_future(monkeypatch: pytest.MonkeyPatch, journal: AsyncStore, seconds: float) -> None:
    """Let the store's clocks be ahead of themselves."""
    for name in ("time_s", "service_time_s"):
        clock = getattr(AsyncStore, name)
        monkeypatch.setattr(AsyncStore, name, property(lambda _, clock=clock: clock.fget(journal) + seconds))
