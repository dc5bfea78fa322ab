"""Server process: this project's server, run for a benchmark, and sessions on it that go on from load to load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import grpc

from benchmarks import calls
from benchmarks.load import Call, Kind, LoadReport
from benchmarks.peers.naive import INPUT_SIZE, ROOT
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc

MODELS = ROOT / "models"

Rpc = Literal["Step", "StreamSteps", "BatchStep"]


@contextmanager
def serving(
    models: Path, *flags: str, store: str = "none", variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, list[int]]]:
    """Run the server on a port of its own; gives its address and the process's id.

    Raises:
        RuntimeError: it ended before it listened; its log is in the message.
    """
    command = [sys.executable, "-m", "server", "--models", str(models), "--listen", "127.0.0.1:0"]
    command += ["--device", "cpu", "--log-format", "json", "--store", store, *flags]
    process = subprocess.Popen(  # noqa: S603  # nosec B603  # a command of our own
        command, cwd=ROOT, env={**os.environ, **(variables or {})}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    log: list[str] = []
    try:
        for line in process.stderr:
            log.append(line)
            if json.loads(line)["event"] == "listening":
                break
        else:
            raise RuntimeError(f"the server ended with {process.wait()} before it listened: {''.join(log)}")
        yield str(json.loads(log[-1])["address"]), [process.pid]
    finally:
        process.terminate()
        process.communicate()


@dataclass(frozen=True)
class Shape:
    """What a load's messages are made of."""

    rpc: Rpc
    num_sessions: int
    """S, of all lanes together."""
    num_steps: int
    """T, of each session in a message."""
    in_flight: int = 1
    """Messages of a lane that may wait for their answers; more than one only on a stream, since gRPC keeps no order
    between calls, and one that overtakes another of its session leaves a gap."""
    num_lanes: int = 1
    """Of BatchSteps, each with an equal part of the sessions; every other session has a lane to itself."""

    @property
    def kind(self) -> Kind:
        """How `load.py` sends them."""
        return "stream" if self.rpc == "StreamSteps" else "unary"


class Sessions:
    """The sessions of one load, and how far each of its lanes has come."""

    def __init__(self, address: str, shape: Shape) -> None:
        """Create them on a server that has the model `copy`."""
        self._shape = shape
        request = pb.CreateSessionRequest(model_name="copy")
        with grpc.insecure_channel(address) as channel:
            create = session_service_pb2_grpc.SessionServiceStub(channel).CreateSession
            ids = [create(request).session.session_id for _ in range(shape.num_sessions)]
        num_lanes = shape.num_lanes if shape.rpc == "BatchStep" else len(ids)
        ends = [len(ids) * lane // num_lanes for lane in range(num_lanes + 1)]
        self._ids = [ids[start:end] for start, end in pairwise(ends)]
        self._next_steps = [0] * num_lanes

    def lanes(self) -> list[Call]:
        """The lanes, for a load that begins now."""
        return [self._call(ids, step) for ids, step in zip(self._ids, self._next_steps, strict=True)]

    def advance(self, report: LoadReport) -> None:
        """Learn from a load's answers how far each lane has come.

        Raises:
            LoadError: a session failed within a BatchStep.
        """
        if self._shape.rpc == "BatchStep":
            calls.check_batches(report)
        self._next_steps = [self._next_step(answer) for answer in report.last_answers]

    def _call(self, ids: Sequence[str], first_step: int) -> Call:
        if self._shape.rpc == "BatchStep":
            return calls.batch_call(ids, self._shape.num_steps, INPUT_SIZE, first_step)
        make = calls.step_calls if self._shape.rpc == "Step" else calls.stream_calls
        return make(ids, self._shape.num_steps, INPUT_SIZE, first_step)[0]

    def _next_step(self, answer: bytes) -> int:
        if self._shape.rpc == "BatchStep":
            return pb.BatchStepResponse.FromString(answer).next_steps[0]
        if self._shape.rpc == "Step":
            return pb.StepResponse.FromString(answer).next_step
        return pb.StreamStepsResponse.FromString(answer).step.next_step
