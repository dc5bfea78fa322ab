"""Several replicas on one store: a session has one owner at a time, and moves to whoever is called."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import monotonic

import grpc
import numpy as np
import pytest
import pytest_asyncio

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from tests.conftest import ServerProcess
from tests.server.helpers import Caller, Start, accumulated, crash, pending, random_inputs, refused
from tests.valkey import ValkeyServer

LEASE_S = 2.0


@pytest_asyncio.fixture
async def replicas(serve: Start, models: Path, valkey: ValkeyServer) -> AsyncIterator[tuple[Caller, Caller]]:
    """Two servers on one Valkey, as two callers."""
    callers = []
    for _ in range(2):
        server, address = await serve(
            models,
            store=valkey.url,
            sync="normal",
            lease_s=LEASE_S,
            snapshot_every_steps=6,
            max_resident_sessions=8,
            max_batch_size=4,
        )
        callers.append(Caller(server, address))
    yield callers[0], callers[1]
    for caller in callers:
        await caller.channel.close()


async def step_until_done(callers: list[Caller], request: pb.StepRequest) -> np.ndarray:
    """Send a step to one replica after the other until one answers it, as a client behind a router does."""
    deadline_s = monotonic() + 20
    while True:
        for caller in callers:
            try:
                return to_array((await caller.stub.Step(request)).outputs)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or monotonic() > deadline_s:
                    raise


async def test_a_session_goes_on_at_whichever_replica_is_called(replicas: tuple[Caller, Caller]) -> None:
    inputs = random_inputs(40)
    await replicas[0].create("accumulator")

    outputs = [await replicas[step % 2].step(inputs[step : step + 1], first_step=step) for step in range(40)]

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))
    np.testing.assert_array_equal(await replicas[0].step(inputs[5:40], first_step=5), accumulated(inputs)[5:])
    assert "s" not in replicas[1].server.sessions.in_memory


async def test_a_hand_over_waits_for_the_calls_in_line_and_refuses_those_after(
    replicas: tuple[Caller, Caller],
) -> None:
    one, other = replicas
    inputs = random_inputs(6)
    await one.create("accumulator")
    with one.hold("accumulator"):
        first = asyncio.ensure_future(one.step(inputs[:2], first_step=0))
        await pending(one, "accumulator", 1)
        moved = asyncio.ensure_future(other.step(inputs[2:4], first_step=2))
        while not one.server.sessions.in_memory["s"].is_leaving:
            await asyncio.sleep(0)
        await refused(one.step(inputs[4:]), grpc.StatusCode.UNAVAILABLE, "SESSION_MOVED")

    np.testing.assert_array_equal(np.concatenate([await first, await moved]), accumulated(inputs)[:4])


async def test_reads_of_a_session_that_another_replica_has_are_up_to_date(
    replicas: tuple[Caller, Caller],
) -> None:
    one, other = replicas
    inputs = random_inputs(3)
    await one.create("accumulator")
    for step in range(3):
        await one.step(inputs[step : step + 1])
        assert await other.next_step() == step + 1
        (listed,) = (await other.stub.ListSessions(pb.ListSessionsRequest())).sessions
        assert listed.next_step == step + 1

    np.testing.assert_array_equal((await other.state())["sum"], accumulated(inputs)[-1])


async def test_a_batch_says_which_of_its_sessions_are_elsewhere(replicas: tuple[Caller, Caller]) -> None:
    one, other = replicas
    inputs = np.stack([random_inputs(2, index) for index in range(4)])
    for index in range(4):
        await (one if index % 2 else other).create("accumulator", f"s{index}")

    request = pb.BatchStepRequest(session_ids=[f"s{i}" for i in range(4)], inputs=to_message(inputs))
    answer = await one.stub.BatchStep(request)

    assert [(error.index, error.reason) for error in answer.errors] == [
        (0, "WRONG_REPLICA"),
        (2, "WRONG_REPLICA"),
    ]
    assert {error.metadata["replica"] for error in answer.errors} == {
        other.server.sessions.store.backend.replica_id
    }
    for index in (1, 3):
        np.testing.assert_array_equal(to_array(answer.outputs)[index], accumulated(inputs[index]))
    assert await other.next_step("s0") == 0


async def test_the_sessions_of_a_replica_that_stops_are_free_at_once(
    replicas: tuple[Caller, Caller],
) -> None:
    one, other = replicas
    inputs = random_inputs(5)
    for index in range(6):
        await one.create("accumulator", f"s{index}")
        await one.step(inputs[:4], f"s{index}")

    await one.server.stop()

    assert await other.server.sessions.store.find_request("") is None
    for index in range(6):
        (claim,) = await other.server.sessions.store.claim([f"s{index}"])
        assert claim.snapshot
        assert b'"snapshot_step":4' in claim.entry.content
        np.testing.assert_array_equal(
            await other.step(inputs[4:], f"s{index}", first_step=4), accumulated(inputs)[4:]
        )


async def test_the_sessions_of_a_replica_that_died_are_taken_over_when_its_lease_has_run_out(
    replicas: tuple[Caller, Caller],
) -> None:
    one, other = replicas
    inputs = random_inputs(9)
    await one.create("accumulator")
    await one.step(inputs[:8], first_step=0)
    store = one.server.sessions.store.backend
    beat = one.server.sessions.store.lease.last_beat
    store.beat = lambda: beat  # type: ignore[method-assign]  # no more heartbeats
    store.close = lambda: None  # type: ignore[method-assign]
    await crash(one.server)

    outputs = await step_until_done(
        [other], pb.StepRequest(session_id="s", inputs=to_message(inputs[6:]), first_step=6)
    )

    np.testing.assert_array_equal(outputs, accumulated(inputs)[6:])


async def test_a_router_that_keeps_moving_sessions_loses_and_doubles_nothing(
    replicas: tuple[Caller, Caller],
) -> None:
    num_steps = 30
    inputs = {f"s{index}": random_inputs(num_steps, index) for index in range(10)}
    for number, session_id in enumerate(inputs):
        await replicas[number % 2].create("accumulator", session_id)
    random = np.random.default_rng(1)

    async def run(session_id: str) -> np.ndarray:
        outputs, step = [], 0
        while step < num_steps:
            size = int(random.integers(1, 4))
            order = list(replicas) if random.random() < 0.5 else list(replicas)[::-1]
            request = pb.StepRequest(
                session_id=session_id,
                inputs=to_message(inputs[session_id][step : step + size]),
                first_step=step,
            )
            outputs.append(await step_until_done(order, request))
            step += size
        return np.concatenate(outputs)

    for outputs, of_session in zip(await asyncio.gather(*map(run, inputs)), inputs.values(), strict=True):
        np.testing.assert_array_equal(outputs, accumulated(of_session))


async def test_two_replicas_called_at_once_run_a_step_once(replicas: tuple[Caller, Caller]) -> None:
    inputs = random_inputs(20)
    await replicas[0].create("accumulator")

    for step in range(20):
        request = pb.StepRequest(session_id="s", inputs=to_message(inputs[step : step + 1]), first_step=step)
        answers = await asyncio.gather(
            step_until_done([*replicas], request), step_until_done([*replicas][::-1], request)
        )
        for outputs in answers:
            np.testing.assert_array_equal(outputs, accumulated(inputs)[step : step + 1])


async def test_the_same_creation_at_two_replicas_makes_one_session(replicas: tuple[Caller, Caller]) -> None:
    created = await asyncio.gather(*(caller.create("accumulator", "", request_id="r") for caller in replicas))

    assert len({session.session_id for session in created}) == 1
    assert len((await replicas[0].stub.ListSessions(pb.ListSessionsRequest())).sessions) == 1


async def test_a_replica_that_was_cut_off_answers_nothing_stale_and_comes_back_as_another(
    replicas: tuple[Caller, Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = replicas
    inputs = random_inputs(4)
    await one.create("accumulator")
    await one.step(inputs[:2], first_step=0)
    store, ownership = one.server.sessions.store, one.server.sessions.ownership
    old_id, lapsed = store.backend.replica_id, asyncio.Event()

    def lapse() -> None:
        ownership.drop_all()
        lapsed.set()

    store.lease.watch(lapse, lambda _: None)  # it hears nobody
    with monkeypatch.context() as patch:
        patch.setattr(store.backend, "beat", lambda: store.lease.last_beat)  # it believes to beat
        outputs = await step_until_done(
            [other], pb.StepRequest(session_id="s", inputs=to_message(inputs[2:3]), first_step=2)
        )
        np.testing.assert_array_equal(outputs, accumulated(inputs)[2:3])
        for call in (one.state(), one.next_step(), one.step(inputs[:2], first_step=0)):
            await refused(call, grpc.StatusCode.UNAVAILABLE, "LEASE_LAPSED")
    await lapsed.wait()

    assert store.backend.replica_id != old_id
    np.testing.assert_array_equal(await one.step(inputs[3:], first_step=3), accumulated(inputs)[3:])


def test_a_replica_that_was_stopped_past_its_lease_writes_nothing_and_answers_nothing_stale(
    start_server: Callable[..., ServerProcess], models: Path, valkey: ValkeyServer
) -> None:
    """SIGSTOP, another takes over, SIGCONT: the first moves the clients on, and nothing forks."""
    flags = ("--sync", "normal", "--lease-s", str(LEASE_S))
    one, other = (start_server(models, *flags, store=valkey.url) for _ in range(2))
    inputs = random_inputs(30)
    stubs = [
        session_service_pb2_grpc.SessionServiceStub(grpc.insecure_channel(process.address))
        for process in (one, other)
    ]
    stubs[0].CreateSession(pb.CreateSessionRequest(model_name="accumulator", session_id="s"))

    def step(stub: session_service_pb2_grpc.SessionServiceStub, first: int, size: int) -> np.ndarray:
        request = pb.StepRequest(
            session_id="s", first_step=first, inputs=to_message(inputs[first : first + size])
        )
        while True:
            try:
                return to_array(stub.Step(request, timeout=20).outputs)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise

    step(stubs[0], 0, 10)
    under_way = stubs[0].Step.future(
        pb.StepRequest(session_id="s", first_step=10, inputs=to_message(inputs[10:12]))
    )
    one.signal(signal.SIGSTOP)
    taken_over = step(stubs[1], 10, 10)
    late = stubs[0].GetState.future(pb.GetStateRequest(session_id="s"))
    one.signal(signal.SIGCONT)

    np.testing.assert_array_equal(taken_over, accumulated(inputs)[10:20])
    if under_way.exception(20) is None:  # it ran before the stop
        np.testing.assert_array_equal(to_array(under_way.result().outputs), accumulated(inputs)[10:12])
    if late.exception(20) is None:
        assert late.result().next_step == 20
    for call in (under_way, late):
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    np.testing.assert_array_equal(step(stubs[0], 15, 15), accumulated(inputs)[15:])
    assert stubs[1].GetSession(pb.GetSessionRequest(session_id="s")).session.next_step == 30


def take_overs(caller: Caller, cause: str) -> float:
    registry = caller.server.metrics.registry
    return registry.get_sample_value("ntm_session_take_overs_total", {"cause": cause}) or 0.0


async def test_sessions_from_other_replicas_are_counted_by_how_they_came(
    replicas: tuple[Caller, Caller],
) -> None:
    one, other = replicas
    inputs = random_inputs(3)
    for session_id in ("given", "left"):
        await one.create("accumulator", session_id)
        await one.step(inputs[:1], session_id)

    await other.step(inputs[1:2], "given", first_step=1)
    await crash(one.server)
    await step_until_done(
        [other], pb.StepRequest(session_id="left", first_step=1, inputs=to_message(inputs[1:2]))
    )
    await other.step(inputs[2:], "given", first_step=2)

    assert (take_overs(other, "asked"), take_overs(other, "dead")) == (1, 1)
    assert (take_overs(one, "asked"), take_overs(one, "dead")) == (0, 0)
