"""What is repeated and what is not, batches across replicas, and snapshots, with a router that follows a script."""

from __future__ import annotations

import asyncio
import threading
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest

import ntm
from ntm import AsyncClient, Client
from ntm._errors import from_status
from ntm.tensor import to_array, to_message
from ntm.v1 import session_pb2
from ntm.v1 import session_service_pb2 as pb
from tests.client.helpers import Router, abort_with_reason
from tests.server.helpers import accumulated, random_inputs

BROKEN = [grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN]
BATCH_STEP = "/ntm.v1.SessionService/BatchStep"


@pytest.mark.parametrize("code", [*BROKEN, grpc.StatusCode.UNAVAILABLE])
def test_a_call_that_a_router_ended_is_repeated_and_takes_effect_once(
    router: Router, code: grpc.StatusCode
) -> None:
    inputs = random_inputs(5)
    router.faults["Step"].extend([code, code])

    with Client(router.address) as c, c.session("accumulator") as session:
        outputs = session.run(inputs)

        assert (session.next_step, router.count("Step")) == (5, 3)
    np.testing.assert_array_equal(outputs, accumulated(inputs))


@pytest.mark.parametrize("code", BROKEN)
async def test_the_asyncio_client_repeats_it_too(router: Router, code: grpc.StatusCode) -> None:
    inputs = random_inputs(5)
    router.faults["Step"].extend([code, code])

    async with AsyncClient(router.address) as c, await c.session("accumulator") as session:
        outputs = await session.run(inputs)

        assert (session.next_step, router.count("Step")) == (5, 3)
    np.testing.assert_array_equal(outputs, accumulated(inputs))


def answer_with(
    router: Router, rpc: str, code: grpc.StatusCode, reason: str, domain: str = "ntm.v1", times: int = 1000
) -> None:
    """Have the router end the next calls with a reason, and then pass them on."""

    def fail(request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        if router.count(rpc) <= times:
            abort_with_reason(context, code, reason, domain)
        return router.passed_on(f"/ntm.v1.SessionService/{rpc}", request, context)

    router.handlers[rpc] = fail


@pytest.mark.parametrize("code", BROKEN)
def test_an_error_with_the_servers_own_reason_is_not_repeated(router: Router, code: grpc.StatusCode) -> None:
    with Client(router.address) as c, c.session("accumulator") as session:
        answer_with(router, "Step", code, "STEP_FAILED")
        with pytest.raises(ntm.InternalError, match="STEP_FAILED"):
            session.step(np.zeros(3))
        assert router.count("Step") == 1


def test_a_reason_of_somebody_elses_does_not_make_it_the_servers_own(router: Router) -> None:
    with Client(router.address) as c, c.session("accumulator") as session:
        answer_with(router, "Step", grpc.StatusCode.INTERNAL, "NO_UPSTREAM", domain="router", times=1)
        session.step(np.zeros(3))
        assert router.count("Step") == 2


def test_a_call_cut_by_its_own_client_is_not_repeated(router: Router) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def waits(request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        arrived.set()
        go_on.wait()
        return b""

    router.handlers["GetSession"] = waits

    with futures.ThreadPoolExecutor() as pool:
        c = Client(router.address)
        call = pool.submit(c.attach, "somebody")
        arrived.wait()
        c.close()
        with pytest.raises(ntm.UnavailableError, match="CANCELLED"):
            call.result(timeout=10)
    go_on.set()

    assert router.count("GetSession") == 1


async def test_a_task_that_is_cancelled_is_not_held_up_by_retries(router: Router) -> None:
    router.faults["GetModel"].extend([grpc.StatusCode.UNAVAILABLE] * 1000)

    async with AsyncClient(router.address) as c:
        task = asyncio.create_task(c.model("accumulator"))
        while not router.count("GetModel"):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        *(
            (grpc.StatusCode.FAILED_PRECONDITION, reason, ntm.StepOrderError)
            for reason in ("STEP_GAP", "STEP_TOO_OLD", "INPUT_MISMATCH", "STATE_NOT_KEPT")
        ),
        *(
            (grpc.StatusCode.FAILED_PRECONDITION, reason, ntm.PreconditionError)
            for reason in ("MODEL_MISMATCH", "MODEL_NOT_LOADED", "RECOVERY_NOT_EXACT", "")
        ),
        (grpc.StatusCode.DATA_LOSS, "SESSION_CORRUPT", ntm.DataLossError),
        (grpc.StatusCode.UNAVAILABLE, "WRONG_REPLICA", ntm.UnavailableError),
        (grpc.StatusCode.ABORTED, "", ntm.InternalError),
    ],
)
def test_the_reason_and_the_code_choose_the_type(
    code: grpc.StatusCode, reason: str, expected: type[ntm.ClientError]
) -> None:
    assert type(from_status(code.value[0], reason, "", {})) is expected


class Replicas:
    """BatchStep as several replicas answer it: each runs the sessions that it owns, and names the owner of others.

    A call goes to the replica that its routing key is sent to.
    """

    def __init__(self, router: Router, owners: dict[str, str], routes: dict[str, str] | None = None) -> None:
        self.groups: list[list[str]] = []
        self._router = router
        self._owners = owners
        self._routes = routes or owners
        router.handlers["BatchStep"] = self.answer

    def answer(self, request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        asked = pb.BatchStepRequest.FromString(request)
        self.groups.append(list(asked.session_ids))
        assert key == asked.session_ids[0]
        replica = self._routes[key]
        # A replica that is asked for one session alone has it handed over.
        mine = [
            index
            for index, session_id in enumerate(asked.session_ids)
            if self._owners[session_id] == replica or len(asked.session_ids) == 1
        ]
        inputs = to_array(asked.inputs)
        response = pb.BatchStepResponse(next_steps=[0] * len(inputs))
        if mine:
            passed_on = pb.BatchStepRequest(
                session_ids=[asked.session_ids[index] for index in mine],
                first_steps=[asked.first_steps[index] for index in mine],
                inputs=to_message(inputs[mine]),
            )
            answer = pb.BatchStepResponse.FromString(
                self._router.passed_on(BATCH_STEP, passed_on.SerializeToString(), context)
            )
            outputs = np.zeros_like(inputs)
            outputs[mine] = to_array(answer.outputs)
            response.outputs.CopyFrom(to_message(outputs))
            for position, index in enumerate(mine):
                response.next_steps[index] = answer.next_steps[position]
            response.errors.extend(answer.errors)
            for error in response.errors:
                error.index = mine[error.index]
            response.approximate.extend(mine)
        for index in set(range(len(inputs))) - set(mine):
            response.errors.add(
                index=index,
                code=grpc.StatusCode.UNAVAILABLE.value[0],
                reason="WRONG_REPLICA",
                metadata={"replica": self._owners[asked.session_ids[index]]},
            )
        return response.SerializeToString()


OWNERS = {"r0": "red", "b0": "blue", "r1": "red", "b1": "blue", "g0": "green"}
BATCH = np.stack([random_inputs(4, seed) for seed in range(5)])


def assert_all_ran(sessions: Any, result: ntm.BatchResult) -> None:
    assert result.errors == {}
    assert [session.next_step for session in sessions] == [4] * 5
    assert [session.approximate for session in sessions] == [True] * 5
    for outputs, inputs in zip(result.outputs, BATCH, strict=True):
        np.testing.assert_array_equal(outputs, accumulated(inputs))


def test_items_of_a_batch_go_to_the_replicas_that_have_them(router: Router) -> None:
    replicas = Replicas(router, OWNERS)

    with Client(router.address) as c:
        sessions = [c.session("accumulator", session_id=f"{name}-sync") for name in OWNERS]
        replicas._owners = replicas._routes = {f"{name}-sync": owner for name, owner in OWNERS.items()}
        result = c.batch_step(sessions, BATCH)
        for session in sessions:
            session.delete()

    assert_all_ran(sessions, result)
    ids = [session.session_id for session in sessions]
    assert replicas.groups[0] == ids
    assert sorted(replicas.groups[1:]) == [[ids[1], ids[3]], [ids[4]]]


async def test_the_asyncio_client_does_the_same_with_a_batch(router: Router) -> None:
    owners = {f"{name}-async": owner for name, owner in OWNERS.items()}
    replicas = Replicas(router, owners)

    async with AsyncClient(router.address) as c:
        sessions = [await c.session("accumulator", session_id=name) for name in owners]
        result = await c.batch_step(sessions, BATCH)
        for session in sessions:
            await session.delete()

    assert_all_ran(sessions, result)
    ids = list(owners)
    assert sorted(replicas.groups[1:]) == [[ids[1], ids[3]], [ids[4]]]


def test_items_that_are_sent_to_a_wrong_replica_again_are_sent_alone(router: Router) -> None:
    owners = {f"{name}-alone": owner for name, owner in OWNERS.items()}
    replicas = Replicas(router, owners, routes=dict.fromkeys(owners, "red"))

    with Client(router.address) as c:
        sessions = [c.session("accumulator", session_id=name) for name in owners]
        result = c.batch_step(sessions, BATCH)
        for session in sessions:
            session.delete()

    assert_all_ran(sessions, result)
    ids = list(owners)
    assert sorted(replicas.groups[1:3]) == [[ids[1], ids[3]], [ids[4]]]
    assert sorted(replicas.groups[3:]) == [[ids[1]], [ids[3]]]


def test_items_that_stay_unavailable_have_their_errors_and_the_others_their_results(router: Router) -> None:
    def answer(request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        asked = pb.BatchStepRequest.FromString(request)
        if len(asked.session_ids) == 3:
            run = router.passed_on(BATCH_STEP, request, context)
            response = pb.BatchStepResponse.FromString(run)
            response.next_steps[1] = 0
            response.errors.add(
                index=1, code=14, reason="WRONG_REPLICA", message="elsewhere", metadata={"replica": "b"}
            )
            return response.SerializeToString()
        context.abort(grpc.StatusCode.CANCELLED, "the other replica is dead")
        raise AssertionError

    router.handlers["BatchStep"] = answer

    with Client(router.address, retry_for_s=0.2) as c:
        sessions = [c.session("accumulator") for _ in range(3)]
        result = c.batch_step(sessions, BATCH[:3])

    assert [session.next_step for session in sessions] == [4, 0, 4]
    assert list(result.errors) == [1]
    assert isinstance(result.errors[1], ntm.UnavailableError)
    np.testing.assert_array_equal(result.outputs[1], np.zeros((4, 3)))
    np.testing.assert_array_equal(result.outputs[2], accumulated(BATCH[2]))


def test_a_batch_that_reaches_nobody_is_an_error_as_a_whole(router: Router) -> None:
    with Client(router.address, retry_for_s=0.2) as c, c.session("accumulator") as session:
        router.faults["BatchStep"].extend([grpc.StatusCode.INTERNAL] * 1000)
        with pytest.raises(ntm.UnavailableError):
            c.batch_step([session], BATCH[:1])
        router.faults.clear()

        result = c.batch_step([session], BATCH[:1])
    np.testing.assert_array_equal(result.outputs[0], accumulated(BATCH[0]))


def test_a_batch_needs_a_row_for_each_session(address: str) -> None:
    with Client(address) as c, c.session("accumulator") as session:
        with pytest.raises(ValueError, match="at least one session"):
            c.batch_step([], BATCH)
        with pytest.raises(ValueError, match="5 rows for 1 sessions"):
            c.batch_step([session], BATCH)


class Snapshots:
    """ExportSession and ImportSession by the contract, for sessions of the accumulator; the second answers are lost."""

    def __init__(self, router: Router) -> None:
        self.imports: list[pb.ImportSessionRequest] = []
        router.handlers["ExportSession"] = self.export
        router.handlers["ImportSession"] = self.take_in
        router.faults["ImportSession"].append(grpc.StatusCode.UNAVAILABLE)

    def export(self, request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        session_id = pb.ExportSessionRequest.FromString(request).session_id
        assert key == session_id
        return pb.ExportSessionResponse(snapshot=b"snapshot of " + session_id.encode()).SerializeToString()

    def take_in(self, request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        self.imports.append(pb.ImportSessionRequest.FromString(request))
        assert key == self.imports[-1].session_id
        session = session_pb2.Session(
            session_id=key, model_name="accumulator", model_version=1, next_step=7, approximate=True
        )
        return pb.ImportSessionResponse(session=session).SerializeToString()


def test_a_session_is_exported_and_imported_under_a_new_name(router: Router) -> None:
    snapshots = Snapshots(router)

    with Client(router.address) as c, c.session("accumulator") as session:
        snapshot = session.export()
        named = c.import_session(snapshot, session_id="imported")
        unnamed = c.import_session(snapshot)

    assert snapshot == b"snapshot of " + session.session_id.encode()
    assert (named.session_id, named.next_step, named.approximate) == ("imported", 7, True)
    first, repeat, second = snapshots.imports
    assert first == repeat
    assert first.snapshot == second.snapshot == snapshot
    assert first.request_id != second.request_id
    assert len(unnamed.session_id) == len(second.request_id) == 32


async def test_the_asyncio_client_exports_and_imports(router: Router) -> None:
    snapshots = Snapshots(router)

    async with AsyncClient(router.address) as c, await c.session("accumulator") as session:
        imported = await c.import_session(await session.export(), session_id="imported")

    assert (imported.session_id, imported.next_step, imported.approximate) == ("imported", 7, True)
    assert snapshots.imports[0] == snapshots.imports[1]


def test_a_session_knows_whether_it_is_approximate_from_its_last_answer(router: Router) -> None:
    def answer(request: bytes, key: str, context: grpc.ServicerContext) -> bytes:
        answered = router.passed_on("/ntm.v1.SessionService/Step", request, context)
        response = pb.StepResponse.FromString(answered)
        response.approximate = router.count("Step") == 1
        return response.SerializeToString()

    router.handlers["Step"] = answer

    with Client(router.address) as c, c.session("accumulator") as session:
        told = [session.approximate]
        for _ in range(2):
            session.step(np.zeros(3))
            told.append(session.approximate)

    assert told == [False, True, False]
