"""Attacks by calls that anybody may make: much of what is allowed, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from multiprocessing.synchronize import Event
from typing import Any

import grpc
import numpy as np

from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc, tensor_pb2

_NUM_CALLERS = 32
SERVICE = "/ntm.v1.SessionService"

Attempt = Callable[[grpc.aio.Channel, int], Awaitable[Any]]


def _calling(
    attempt: Attempt, num_callers: int = _NUM_CALLERS, token: str | None = None
) -> Callable[[str, Event], None]:
    """An attack of so many callers, each of whom makes one call after another."""

    async def run(address: str, stop: Event) -> None:
        async def one(number: int) -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                while not stop.is_set():
                    try:
                        await asyncio.wait_for(attempt(channel, number), 30)
                    except (grpc.RpcError, TimeoutError):
                        await asyncio.sleep(0)

        callers = [asyncio.ensure_future(one(number)) for number in range(num_callers)]
        await asyncio.to_thread(stop.wait)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers, timeout=5)

    return lambda address, stop: asyncio.run(run(address, stop))


def _raw(channel: grpc.aio.Channel, rpc: str, content: bytes, token: str = "") -> Awaitable[bytes]:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    call: Any = channel.unary_unary(f"{SERVICE}/{rpc}")
    return call(content, metadata=metadata)


def _stub(channel: grpc.aio.Channel) -> Any:
    return session_service_pb2_grpc.SessionServiceStub(channel)


_FORGED = pb.ImportSessionRequest(snapshot=bytes(3 * 2**20)).SerializeToString()
_AXES = pb.StepRequest(session_id="s", inputs=tensor_pb2.Tensor(shape=[1] * 1_000_000)).SerializeToString()
_MISSING = pb.BatchStepRequest(
    session_ids=[f"missing-{number}" for number in range(1024)],
    inputs=to_message(np.zeros((1024, 1, 9), np.float32)),
).SerializeToString()
_LARGE = pb.StepRequest(
    session_id="missing", inputs=to_message(np.zeros((1024, 1000), np.float32))
).SerializeToString()


async def _churn(channel: grpc.aio.Channel, number: int) -> None:
    stub = _stub(channel)
    made = await stub.CreateSession(pb.CreateSessionRequest(model_name="copy"))
    await stub.DeleteSession(pb.DeleteSessionRequest(session_id=made.session.session_id))


async def _list(channel: grpc.aio.Channel, number: int) -> None:
    await _stub(channel).ListSessions(pb.ListSessionsRequest(page_size=1000))


async def _endless(channel: grpc.aio.Channel, number: int) -> None:
    stub, session_id = _stub(channel), f"endless-{number}"
    with_id = pb.CreateSessionRequest(model_name="endless", session_id=session_id, request_id=session_id)
    await stub.CreateSession(with_id)
    inputs = to_message(np.full((1, 3), 2000, np.float32))
    await stub.Step(pb.StepRequest(session_id=session_id, inputs=inputs))


async def _unread(channel: grpc.aio.Channel, number: int) -> None:
    """A stream that sends and never reads its answers."""
    stub = _stub(channel)
    made = await stub.CreateSession(pb.CreateSessionRequest(model_name="copy"))
    inputs = to_message(np.zeros((256, 9), np.float32))
    step = pb.StepRequest(session_id=made.session.session_id, inputs=inputs)
    call = stub.StreamSteps(metadata=[])
    for _ in range(1000):
        await call.write(pb.StreamStepsRequest(step=step))


async def _garbage_stream(channel: grpc.aio.Channel, number: int) -> None:
    call: Any = channel.stream_stream(f"{SERVICE}/StreamSteps")
    async for _ in call(iter([b"\xff"])):
        pass


async def _reflect(channel: grpc.aio.Channel, number: int) -> None:
    call: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    stream = call()
    while True:
        await stream.write(b"\x3a\x00")  # list_services: ""
        await stream.read()


forged_imports = _calling(lambda channel, _: _raw(channel, "ImportSession", _FORGED), 8)
no_messages = _calling(lambda channel, _: _raw(channel, "Step", b"\xff"))
no_messages_on_streams = _calling(_garbage_stream)
millions_of_axes = _calling(lambda channel, _: _raw(channel, "Step", _AXES), 8)
missing_sessions = _calling(lambda channel, _: _raw(channel, "BatchStep", _MISSING), 8)
large_requests = _calling(lambda channel, _: _raw(channel, "Step", _LARGE), 8)
sessions_made_and_ended = _calling(_churn)
lists = _calling(_list)
endless_steps = _calling(_endless, 2)
unread_streams = _calling(_unread, 8)
reflection = _calling(_reflect, 8)
wrong_tokens = _calling(lambda channel, _: _raw(channel, "Step", b"", "not-a-token"))


async def _step_as_attacker(channel: grpc.aio.Channel, number: int) -> None:
    """A session of its own, stepped as fast as can be, many calls at once."""
    stub, metadata = _stub(channel), [("authorization", "Bearer a-token")]
    made = await stub.CreateSession(pb.CreateSessionRequest(model_name="copy"), metadata=metadata)
    request = pb.StepRequest(
        session_id=made.session.session_id, inputs=to_message(np.zeros((64, 9), np.float32))
    )
    while True:
        await asyncio.gather(
            *(stub.Step(request, metadata=metadata) for _ in range(8)), return_exceptions=True
        )


steps_of_a_principal = _calling(_step_as_attacker)
