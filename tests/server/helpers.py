"""What the server's tests share: a caller of a real server, and what the accumulator must answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from server.launch import Server
from server.sessions.request import StepRequest, Waiter
from server.storage.commit_writer import Outcome
from server.storage.interface import Write

Start = Callable[..., Awaitable[tuple[Server, str]]]
INVALID, GONE, ORDER, TAKEN, EXHAUSTED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class Caller:
    """A stub, and the few requests these tests make."""

    def __init__(self, server: Server, address: str) -> None:
        self.server = server
        self.address = address
        self.channel = grpc.aio.insecure_channel(address)
        self.stub: Any = session_service_pb2_grpc.SessionServiceStub(self.channel)

    async def create(self, model: str, session_id: str = "s", **fields: Any) -> Any:
        request = pb.CreateSessionRequest(model_name=model, session_id=session_id, **fields)
        return (await self.stub.CreateSession(request)).session

    async def step(self, inputs: np.ndarray, session_id: str = "s", **fields: Any) -> np.ndarray:
        request = pb.StepRequest(session_id=session_id, inputs=to_message(inputs), **fields)
        return to_array((await self.stub.Step(request)).outputs)

    async def next_step(self, session_id: str = "s") -> int:
        request = pb.GetSessionRequest(session_id=session_id)
        return (await self.stub.GetSession(request)).session.next_step

    async def state(self, session_id: str = "s", *names: str) -> dict[str, np.ndarray]:
        answer = await self.stub.GetState(pb.GetStateRequest(session_id=session_id, names=names))
        return {tensor.name: to_array(tensor.value) for tensor in answer.state}

    def hold(self, model: str) -> Any:
        """Keep the model's engine from taking its next batch."""
        return self.server.sessions.models.find(model, None).engine.device_held()


class Admitted:
    """A step request that was admitted without gRPC, as `rpc/` admits them."""

    def __init__(
        self,
        caller: Caller,
        session_id: str,
        inputs: np.ndarray,
        first_step: int | None = None,
        wants_state: bool = False,
        follows: Admitted | None = None,
    ) -> None:
        self._executor = caller.server.sessions.executor
        session = caller.server.sessions.in_memory[session_id]
        self._model = session.model.model
        (name,) = self._model.inputs.names
        self._waiter = Waiter()
        self.request = StepRequest(
            [session],
            self._model.inputs.pack({name: inputs})[None],
            None if first_step is None else (first_step,),
            self._waiter,
            wants_state,
            follows.request if follows else None,
        )
        self._executor.admit([self.request])

    @property
    def is_answered(self) -> bool:
        return self._waiter.future.done()

    def cancel(self) -> None:
        self._executor.cancel(self.request)

    async def result(self) -> tuple[np.ndarray, int, dict[str, np.ndarray]]:
        """Outputs, the counter, and the state; raises what the request failed with."""
        result = (await self._waiter.future).result()
        (name,) = self._model.outputs.names
        return self._model.outputs.tensor(result.outputs, name), result.next_step, result.state


def submitted_to(caller: Caller, model: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a model's engine is given from now on: the sessions of what it is given at once."""
    served = caller.server.sessions.models.find(model, None)
    submitted, submit = list[list[str]](), served.submit

    def submit_and_note(requests: Sequence[StepRequest]) -> None:
        submitted.append([session_id for request in requests for session_id in request.session_ids])
        submit(requests)

    monkeypatch.setattr(served, "submit", submit_and_note)
    return submitted


async def refused(call: Awaitable[Any], code: grpc.StatusCode, reason: str) -> dict[str, str]:
    """Expect a call to fail with a code and a reason; returns the ErrorInfo's metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info = error_details_pb2.ErrorInfo()
    trailing = dict(caught.value.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailing, caught.value
    status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details[0].Unpack(info)
    assert (caught.value.code(), info.reason) == (code, reason), caught.value.details()
    assert info.domain == "ntm.v1"
    return dict(info.metadata)


def random_inputs(num_steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, 3)).astype(np.float32)


def accumulated(inputs: np.ndarray) -> np.ndarray:
    """What the accumulator gives for a session's inputs, step by step."""
    total, outputs = np.zeros(3, np.float32), []
    for row in inputs:
        total = np.float32(0.5) * total + row
        outputs.append(total)
    return np.array(outputs)


async def pending(caller: Caller, model: str, count: int) -> None:
    """Wait until so many messages wait for a model: each turn of the loop lets arrivals in."""
    served = caller.server.sessions.models.find(model, None)
    while served.num_pending != count:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # what came in this turn goes to the engine in the next


async def crash(server: Server) -> None:
    """End a server as its death would: nothing is released, and no more is written."""

    async def unwritten(writes: Sequence[Write]) -> list[Outcome]:
        return await asyncio.get_running_loop().create_future()

    async def nothing(timeout_s: float) -> bool:
        return True

    server.sessions.store.commit = unwritten  # type: ignore[method-assign]
    server.sessions.ownership.release_all = nothing  # type: ignore[method-assign]
    await server.stop()
