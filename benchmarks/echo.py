"""Echo: a service that does nothing, with the project's own messages. What it reaches is the transport's ceiling.

`python -m benchmarks.echo --flavour asyncio|uvloop|threads` prints the port it listens on, and stops on SIGTERM.
A request is parsed, and answered with outputs of shape [T, 8] for each session, made once for each shape.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import numpy as np

from ntm.tensor import to_message
from ntm.v1 import session_pb2
from ntm.v1 import session_service_pb2 as pb

FLAVOURS = ("asyncio", "uvloop", "threads")

OUTPUT_SIZE = 8

# As in server/lifecycle.py, by the default settings.
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
]

# Each stream keeps a thread.
_NUM_THREADS = 256


@contextmanager
def running(flavour: str) -> Iterator[tuple[str, list[int]]]:
    """An echo server in a process of its own; gives its address and the process's id.

    It inherits what `server` sets for gRPC in the environment of whoever imports it, as `benchmarks` does.
    """
    command = [sys.executable, "-m", "benchmarks.echo", "--flavour", flavour]
    process = subprocess.Popen(  # noqa: S603  # nosec B603  # a command of our own
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}", [process.pid]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def create_session(request: pb.CreateSessionRequest, context: object) -> pb.CreateSessionResponse:
    """For threads, as the others without `_async`."""
    return pb.CreateSessionResponse(session=session_pb2.Session(session_id=uuid.uuid4().hex))


def step(request: pb.StepRequest, context: object) -> pb.StepResponse:
    return _step_response(*request.inputs.shape[:1])


def stream_steps(
    requests: Iterator[pb.StreamStepsRequest], context: object
) -> Iterator[pb.StreamStepsResponse]:
    for request in requests:
        yield _stream_response(request.step.session_id, *request.step.inputs.shape[:1])


def batch_step(request: pb.BatchStepRequest, context: object) -> pb.BatchStepResponse:
    return _batch_response(*request.inputs.shape[:2])


async def create_session_async(request: pb.CreateSessionRequest, context: object) -> pb.CreateSessionResponse:
    """For an event loop, as the others with `_async`."""
    return create_session(request, context)


async def step_async(request: pb.StepRequest, context: object) -> pb.StepResponse:
    return _step_response(*request.inputs.shape[:1])


async def stream_steps_async(
    requests: AsyncIterator[pb.StreamStepsRequest], context: object
) -> AsyncIterator[pb.StreamStepsResponse]:
    async for request in requests:
        yield _stream_response(request.step.session_id, *request.step.inputs.shape[:1])


async def batch_step_async(request: pb.BatchStepRequest, context: object) -> pb.BatchStepResponse:
    return _batch_response(*request.inputs.shape[:2])


def _handlers(
    create_session: Any, step: Any, stream_steps: Any, batch_step: Any
) -> tuple[grpc.GenericRpcHandler]:
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
    handlers: dict[str, Any] = {
        "CreateSession": unary(
            create_session, pb.CreateSessionRequest.FromString, pb.CreateSessionResponse.SerializeToString
        ),
        "Step": unary(step, pb.StepRequest.FromString, pb.StepResponse.SerializeToString),
        "StreamSteps": stream(
            stream_steps, pb.StreamStepsRequest.FromString, pb.StreamStepsResponse.SerializeToString
        ),
        "BatchStep": unary(
            batch_step, pb.BatchStepRequest.FromString, pb.BatchStepResponse.SerializeToString
        ),
    }
    return (grpc.method_handlers_generic_handler("ntm.v1.SessionService", handlers),)


@cache
def _step_response(num_steps: int) -> pb.StepResponse:
    return pb.StepResponse(outputs=_outputs(num_steps), next_step=1000)


@cache
def _stream_response(session_id: str, num_steps: int) -> pb.StreamStepsResponse:
    return pb.StreamStepsResponse(session_id=session_id, step=_step_response(num_steps))


@cache
def _batch_response(num_sessions: int, num_steps: int) -> pb.BatchStepResponse:
    outputs = _outputs(num_sessions, num_steps)
    return pb.BatchStepResponse(outputs=outputs, next_steps=[1000] * num_sessions)


def _outputs(*leading_axes: int) -> Any:
    return to_message(np.full((*leading_axes, OUTPUT_SIZE), 0.5, np.float32))


async def _serve_in_loop(listen: str) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers(
        _handlers(create_session_async, step_async, stream_steps_async, batch_step_async)
    )
    port = server.add_insecure_port(listen)
    await server.start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    print(port, flush=True)
    await stopping.wait()
    await server.stop(grace=None)


def _serve_with_threads(listen: str) -> None:
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    server = grpc.server(ThreadPoolExecutor(_NUM_THREADS), options=_OPTIONS)
    server.add_generic_rpc_handlers(_handlers(create_session, step, stream_steps, batch_step))
    port = server.add_insecure_port(listen)
    server.start()
    print(port, flush=True)
    stopping.wait()
    server.stop(grace=None).wait()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flavour", choices=FLAVOURS, default="asyncio")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    arguments = parser.parse_args()
    if arguments.flavour == "threads":
        _serve_with_threads(arguments.listen)
    elif arguments.flavour == "uvloop":
        import uvloop

        uvloop.run(_serve_in_loop(arguments.listen))
    else:
        asyncio.run(_serve_in_loop(arguments.listen))


if __name__ == "__main__":
    main()
