"""A store that fails: calls are refused within bounds, repeats take effect once, and nothing differs afterwards.

The faults are real ones: a line to Valkey that breaks, stalls or loses replies, a Valkey server that dies, and the
stores' own limits.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from ntm import AsyncClient
from ntm.v1 import session_service_pb2 as pb
from tests.conftest import ROOT
from tests.reliability.helpers import Restart, Restarted, refusal_of, tried
from tests.reliability.lines import FaultyLine
from tests.server.helpers import Caller, accumulated, random_inputs
from tests.valkey import ValkeyServer

STORE_TIMEOUT_S = 0.5
LEASE_S = 2.0
BOUND_S = 3 * STORE_TIMEOUT_S
"""One answer that does not come, and a busy machine."""
LONG = 500
"""Steps of a message that takes 12 KB in the store."""
_MOST_BUFFER_BYTES = 2**17

Fill = Callable[[Caller], Awaitable[list[str]]]


@pytest.fixture
def line(valkey: ValkeyServer) -> Iterator[FaultyLine]:
    line = FaultyLine(valkey.port)
    yield line
    line.close()


@pytest.fixture
def start(restart: Restart, line: FaultyLine) -> Restart:
    """Start a server behind the line."""

    async def behind_the_line(**options: Any) -> Restarted:
        url = f"redis://127.0.0.1:{line.port}/0"
        return await restart(store=url, store_timeout_s=STORE_TIMEOUT_S, lease_s=LEASE_S, **options)

    return behind_the_line


async def repeated(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat what is unavailable, as a client does; returns the answer, or the reason of another refusal."""
    while True:
        answer = await tried(call())
        if not isinstance(answer, str) or answer not in (
            "STORE_UNAVAILABLE",
            "LEASE_LAPSED",
            "SESSION_MOVED",
        ):
            return answer
        await asyncio.sleep(0.05)  # as long as a client's first pause


FAULTS: dict[str, Callable[[FaultyLine], None]] = {
    "refused": lambda line: line.refuse(),
    "the answer is lost": lambda line: line.swallow_replies(),
    "the answer is late": lambda line: line.hold(),
    "cut before it arrives": lambda line: line.cut_at(b"EVALSHA"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_step_whose_commit_fails_is_refused_within_bounds_and_its_repeat_takes_effect_once(
    start: Restart, line: FaultyLine, fault: str
) -> None:
    inputs = random_inputs(9)
    caller = await start()
    await caller.create("accumulator")
    await caller.step(inputs[:3], first_step=0)

    FAULTS[fault](line)
    begin_s = time.monotonic()
    refusal = await refusal_of(caller.step(inputs[3:5], first_step=3))
    took_s = time.monotonic() - begin_s
    line.heal()

    assert refusal == "STORE_UNAVAILABLE"
    assert took_s < BOUND_S
    outputs = await repeated(lambda: caller.step(inputs[3:5], first_step=3))
    np.testing.assert_array_equal(outputs, accumulated(inputs)[3:5])
    outputs = await repeated(lambda: caller.step(inputs[5:], first_step=5))
    np.testing.assert_array_equal(outputs, accumulated(inputs)[5:])
    assert await caller.next_step() == 9


async def test_a_session_is_whole_when_the_answer_to_its_recovery_is_lost(
    start: Restart, line: FaultyLine
) -> None:
    inputs = random_inputs(9)
    caller = await start()
    await caller.create("accumulator")
    await caller.step(inputs[:3], first_step=0)
    line.refuse()
    assert await refusal_of(caller.step(inputs[3:5], first_step=3)) == "STORE_UNAVAILABLE"
    line.heal()  # it is out of memory, and has steps to be replayed

    line.swallow_reply_to(b'"num_recoveries":0')  # what was replayed becomes a snapshot
    assert await refusal_of(caller.step(inputs[3:5], first_step=3)) == "STORE_UNAVAILABLE"
    while line.num_marked < 2:  # and what is said of it afterwards has arrived as well
        await asyncio.sleep(0.05)

    outputs = await repeated(lambda: caller.step(inputs[3:], first_step=3))
    np.testing.assert_array_equal(outputs, accumulated(inputs)[3:])


@pytest.mark.parametrize("fault", ["refused", "the answer is lost", "the answer is late"])
async def test_a_creation_a_fork_a_reset_and_a_deletion_are_refused_and_their_repeats_take_effect_once(
    start: Restart, line: FaultyLine, fault: str
) -> None:
    inputs = random_inputs(5)
    caller = await start()
    await caller.create("accumulator")
    await caller.step(inputs[:3], first_step=0)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: caller.create("accumulator", "new", request_id="c"),
        lambda: caller.stub.ForkSession(
            pb.ForkSessionRequest(source_session_id="s", session_id="fork", at_step=3, request_id="f")
        ),
        lambda: caller.stub.ResetSession(pb.ResetSessionRequest(session_id="s", at_step=3)),
        lambda: caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s", allow_missing=True)),
    ]

    for call in calls:
        FAULTS[fault](line)
        refusal = await refusal_of(call())
        line.heal()
        assert refusal in ("STORE_UNAVAILABLE", "LEASE_LAPSED")
        assert not isinstance(await repeated(call), str)

    np.testing.assert_array_equal(
        await caller.step(inputs[3:], "fork", first_step=3), accumulated(inputs)[3:]
    )
    np.testing.assert_array_equal(await caller.step(inputs, "new", first_step=0), accumulated(inputs))
    page = await caller.stub.ListSessions(pb.ListSessionsRequest())
    assert [session.session_id for session in page.sessions] == ["fork", "new"]


async def test_sessions_go_on_when_the_store_was_away_for_longer_than_a_lease(
    start: Restart, line: FaultyLine
) -> None:
    inputs = random_inputs(6)
    caller = await start()
    await caller.create("accumulator")
    await caller.step(inputs[:4], first_step=0)
    journal = caller.server.sessions.store

    line.refuse()
    while journal.holds_lease:
        await asyncio.sleep(0.05)  # the lease is the store's, and runs by its clock
    refusals = {
        await refusal_of(caller.step(inputs[4:], first_step=4)),
        await refusal_of(caller.state()),
    }
    line.heal()

    assert refusals <= {"STORE_UNAVAILABLE", "LEASE_LAPSED"}
    outputs = await repeated(lambda: caller.step(inputs[4:], first_step=4))
    np.testing.assert_array_equal(outputs, accumulated(inputs)[4:])


async def test_a_server_waits_for_a_store_that_is_not_there_yet(start: Restart, line: FaultyLine) -> None:
    line.refuse()
    starting = asyncio.ensure_future(start())
    done, _ = await asyncio.wait([starting], timeout=1.0)  # long enough for it to give up, if it did
    line.heal()

    assert not done
    assert (await (await starting).create("accumulator")).next_step == 0


async def test_no_step_is_lost_or_doubled_on_a_line_that_fails_at_random(
    start: Restart, line: FaultyLine
) -> None:
    caller = await start(max_resident_sessions=3)
    inputs = {f"s{index}": random_inputs(60, index) for index in range(6)}
    chance = random.Random(0)

    async def drive(client: AsyncClient, session_id: str) -> None:
        of_session = inputs[session_id]
        session = await client.session("accumulator", session_id=session_id)
        while (step := session.next_step) < len(of_session):
            outputs = await session.run(of_session[step : step + chance.randint(1, 4)])
            expected = accumulated(of_session)[step : step + len(outputs)]
            np.testing.assert_array_equal(outputs, expected)
            await asyncio.sleep(chance.uniform(0, 0.1))  # so that faults fall between steps, too

    async def spoil() -> None:
        while True:
            await asyncio.sleep(chance.uniform(0, 0.4))
            chance.choice([*FAULTS.values(), lambda line: line.cut()])(line)
            await asyncio.sleep(chance.uniform(0, 0.8))
            line.heal()

    async with AsyncClient(caller.address, retry_for_s=60) as client:
        spoiling = asyncio.ensure_future(spoil())
        try:
            await asyncio.gather(*(drive(client, session_id) for session_id in inputs))
        finally:
            spoiling.cancel()
            line.heal()

    for session_id, of_session in inputs.items():
        state = await repeated(lambda session_id=session_id: caller.state(session_id))
        np.testing.assert_array_equal(state["sum"], accumulated(of_session)[-1])
        assert await caller.next_step(session_id) == len(of_session)


async def test_steps_survive_a_store_that_is_killed_and_started_again(
    restart: Restart, tmp_path: Path
) -> None:
    inputs = random_inputs(6)
    valkey = ValkeyServer(tmp_path / "written-through", appendfsync="always")
    valkey.start()
    try:
        caller = await restart(store=valkey.url, sync="full", store_timeout_s=STORE_TIMEOUT_S)
        await caller.create("accumulator")
        await caller.step(inputs[:4], first_step=0)

        valkey.kill()
        refusal = await refusal_of(caller.step(inputs[4:], first_step=4))
        valkey.start()

        assert refusal == "STORE_UNAVAILABLE"
        outputs = await repeated(lambda: caller.step(inputs[4:], first_step=4))
        np.testing.assert_array_equal(outputs, accumulated(inputs)[4:])
        await caller.end(by_crash=False)
    finally:
        valkey.stop()


async def test_many_calls_for_sessions_out_of_memory_are_refused_within_bounds_while_the_store_stalls(
    start: Restart, line: FaultyLine
) -> None:
    caller = await start(max_resident_sessions=2)
    names = [f"s{index:03}" for index in range(100)]
    for name in names:
        await caller.create("accumulator", name)

    line.hold()
    begin_s = time.monotonic()
    refusals = await asyncio.gather(*(refusal_of(caller.step(random_inputs(1), name)) for name in names[:90]))
    took_s = time.monotonic() - begin_s
    line.heal()

    assert set(refusals) <= {"STORE_UNAVAILABLE", "LEASE_LAPSED"}
    assert took_s < LEASE_S + BOUND_S
    outputs = await repeated(lambda: caller.step(random_inputs(1), names[0], first_step=0))
    np.testing.assert_array_equal(outputs, random_inputs(1))


async def test_a_server_stops_in_time_while_the_store_stalls_and_the_next_finds_everything(
    start: Restart, line: FaultyLine
) -> None:
    inputs = random_inputs(6)
    caller = await start()
    await caller.create("accumulator")
    await caller.step(inputs[:4], first_step=0)

    line.hold()
    begin_s = time.monotonic()
    await caller.end(by_crash=False)
    took_s = time.monotonic() - begin_s
    line.heal()

    assert took_s < LEASE_S + 2 * BOUND_S
    caller = await start()
    outputs = await repeated(lambda: caller.step(inputs[4:], first_step=4))
    np.testing.assert_array_equal(outputs, accumulated(inputs)[4:])


# Full stores.


@pytest_asyncio.fixture
async def full(restart: Restart, models: Path, store: str, request: pytest.FixtureRequest) -> Caller:
    """A server whose store takes about a megabyte."""
    shutil.copytree(ROOT / "models" / "copy", models / "copy")
    options = {"max_resident_sessions": 4, "snapshot_every_steps": 10_000}
    if store.startswith("sqlite"):
        return await restart(store=store, store_limit_mib=1, **options)
    valkey: ValkeyServer = request.getfixturevalue("valkey")
    with valkey.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 2**20)
    return await restart(store=store, **options)


@pytest.fixture
def fill(store: str, request: pytest.FixtureRequest) -> Fill:
    """Make sessions with ever shorter messages until the store takes none; returns their names."""

    async def make(caller: Caller) -> list[str]:
        names: list[str] = []
        for num_steps in (LONG, 50, 5):
            refusal = ""
            while not refusal:
                names.append(f"filler-{len(names)}")
                refusal = await refusal_of(caller.create("accumulator", names[-1]))
                refusal = refusal or await refusal_of(caller.step(random_inputs(num_steps), names[-1]))
            assert refusal == "STORE_FULL"
        if not store.startswith("sqlite"):
            # Valkey takes whatever comes while it is below its limit, and counts buffers there that it soon frees.
            with request.getfixturevalue("valkey").client() as client:
                limit = client.info("memory")["maxmemory"]
                client.config_set("maxmemory", limit - _MOST_BUFFER_BYTES)
        return names

    return make


async def empty(caller: Caller, names: list[str]) -> None:
    for name in names:
        await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id=name, allow_missing=True))


async def test_in_a_full_store_steps_are_refused_sessions_unharmed_and_deletions_make_room(
    full: Caller, fill: Fill
) -> None:
    inputs = random_inputs(4 + LONG)
    await full.create("accumulator")
    await full.step(inputs[:4], first_step=0)
    fillers = await fill(full)

    assert await refusal_of(full.step(inputs[4:], first_step=4)) == "STORE_FULL"
    assert await full.next_step() == 4
    np.testing.assert_array_equal(await full.step(inputs[1:4], first_step=1), accumulated(inputs)[1:4])
    await empty(full, fillers)

    np.testing.assert_array_equal(await full.step(inputs[4:], first_step=4), accumulated(inputs)[4:])
    assert (await full.create("accumulator", "more")).next_step == 0


async def test_sessions_refused_by_a_full_store_time_and_again_are_unharmed_when_there_is_room(
    full: Caller, fill: Fill
) -> None:
    """Each refusal sends the session out of memory, and the next attempt has to bring it back."""
    inputs = random_inputs(5 + LONG)
    await full.create("accumulator")
    await full.step(inputs[:3], first_step=0)
    await full.step(inputs[3:5], first_step=3)
    fillers = await fill(full)

    refusals = {await refusal_of(full.step(inputs[5:], first_step=5)) for _ in range(8)}
    await empty(full, fillers)

    assert refusals == {"STORE_FULL"}
    np.testing.assert_array_equal(await full.step(inputs[5:], first_step=5), accumulated(inputs)[5:])


async def test_a_session_that_is_replayed_again_and_again_for_want_of_room_is_not_quarantined(
    full: Caller, fill: Fill
) -> None:
    """There is room to note that a replay begins, and none for the snapshot that would end it."""
    inputs = np.random.default_rng(0).uniform(0, 1, (6 + LONG, 9)).astype(np.float32)
    await full.create("copy", "other")
    expected = await full.step(inputs, "other")
    await full.create("copy")
    np.testing.assert_array_equal(await full.step(inputs[:6], first_step=0), expected[:6])
    fillers = await fill(full)

    refusals = {await refusal_of(full.step(inputs[6:], first_step=6)) for _ in range(8)}
    await empty(full, fillers)

    assert refusals == {"STORE_FULL"}
    np.testing.assert_array_equal(await full.step(inputs[6:], first_step=6), expected[6:])


async def test_a_session_can_be_deleted_while_a_full_store_refuses_to_bring_it_back(
    full: Caller, fill: Fill
) -> None:
    inputs = np.random.default_rng(0).uniform(0, 1, (6 + LONG, 9)).astype(np.float32)
    await full.create("copy")
    await full.step(inputs[:6], first_step=0)
    await fill(full)
    assert await refusal_of(full.step(inputs[6:], first_step=6)) == "STORE_FULL"

    with full.hold("copy"):
        looking = asyncio.ensure_future(refusal_of(full.state()))
        while not (full.server.sessions.in_memory or looking.done()):
            await asyncio.sleep(0)
        deletion = full.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        deleting = asyncio.ensure_future(refusal_of(deletion))
        while not deleting.done() and full.server.sessions.models.find("copy", None).num_pending < 2:
            await asyncio.sleep(0)

    assert await looking in ("STORE_FULL", "SESSION_NOT_FOUND")
    assert await deleting == ""
    assert await refusal_of(full.state()) == "SESSION_NOT_FOUND"
