"""Naive: the service most people would write, as a peer: synchronous gRPC, a dictionary of states, eager PyTorch.

Each step of each session is one call of the cell with a batch of one. It answers the project's own messages, so
that the same load drives it. Its weights are random: only its speed is compared.

`python -m benchmarks.peers.naive --listen 127.0.0.1:0` prints its port and serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch

from ntm.tensor import to_array, to_message
from ntm.v1 import session_pb2, session_service_pb2_grpc
from ntm.v1 import session_service_pb2 as pb
from training.model import NTMCell, NTMState

ROOT = Path(__file__).parents[2]
INPUT_SIZE, OUTPUT_SIZE = 9, 8


def make_cell() -> NTMCell:
    """A cell of the shipped copy model's sizes, the same on every call."""
    torch.manual_seed(0)
    return NTMCell(
        input_size=INPUT_SIZE,
        output_size=OUTPUT_SIZE,
        memory_rows=128,
        row_width=20,
        controller="lstm",
        controller_size=100,
        num_read_heads=1,
        num_write_heads=1,
        initial_memory="constant",
        initial_attention="constant",
    ).eval()


@contextmanager
def serving() -> Iterator[tuple[str, list[int]]]:
    """Run the service in a process of its own; gives its address and the process's id."""
    command = [sys.executable, "-m", "benchmarks.peers.naive", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: S603  # nosec B603  # a command of our own
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the naive service ended with {process.wait()} before it listened")
        yield f"127.0.0.1:{port}", [process.pid]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@dataclass
class _Session:
    state: NTMState
    next_step: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class NaiveService(session_service_pb2_grpc.SessionServiceServicer):
    """CreateSession, Step and StreamSteps, with nothing that a second reading would ask for."""

    def __init__(self, cell: NTMCell) -> None:
        self._cell = cell
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def CreateSession(  # noqa: N802  # named by the proto
        self, request: pb.CreateSessionRequest, context: grpc.ServicerContext
    ) -> pb.CreateSessionResponse:
        session_id = request.session_id or uuid.uuid4().hex
        with torch.no_grad():
            session = _Session(self._cell.initial_state(1))
        with self._lock:
            self._sessions[session_id] = session
        return pb.CreateSessionResponse(
            session=session_pb2.Session(session_id=session_id, model_name=request.model_name)
        )

    def Step(  # noqa: N802
        self, request: pb.StepRequest, context: grpc.ServicerContext
    ) -> pb.StepResponse:
        with self._lock:
            session = self._sessions.get(request.session_id)
        if session is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no session {request.session_id!r}")
        inputs = torch.from_numpy(to_array(request.inputs).copy())
        outputs = []
        # Autograd is off for the calling thread alone, and each call may come on another.
        with torch.no_grad(), session.lock:
            for row in inputs:
                logits, session.state = self._cell.step(row[None], session.state)
                outputs.append(torch.sigmoid(logits))
            session.next_step += len(inputs)
            next_step = session.next_step
        return pb.StepResponse(outputs=to_message(torch.cat(outputs).numpy()), next_step=next_step)

    def StreamSteps(  # noqa: N802
        self, request_iterator: Iterator[pb.StreamStepsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamStepsResponse]:
        for request in request_iterator:
            yield pb.StreamStepsResponse(
                session_id=request.step.session_id, step=self.Step(request.step, context)
            )


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.naive")
    parser.add_argument("--listen", default="127.0.0.1:0", help="address; port 0 takes a free one")
    parser.add_argument(
        "--workers", type=int, default=256, help="threads; a stream keeps one as long as it lives"
    )
    options = parser.parse_args()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    torch.set_num_threads(1)
    server = grpc.server(ThreadPoolExecutor(options.workers))
    service = NaiveService(make_cell())  # type: ignore[abstract]  # the other methods answer UNIMPLEMENTED
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(service, server)
    port = server.add_insecure_port(options.listen)
    server.start()
    print(port, flush=True)
    stopped.wait()
    server.stop(grace=0).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
