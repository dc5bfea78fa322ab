"""Residence: what a call costs whose session is not in the memory of the server that is called.

It waits in the store (more sessions than slots), another live replica has it (hand-over), or one that was killed had it
(take-over). Latencies are a client's, from the call to its answer, retries included.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter

import grpc
import numpy as np

from benchmarks.growth import create_and_step
from benchmarks.measuring import Figure, Figures, Metrics, side_by_side
from benchmarks.peers.naive import INPUT_SIZE
from benchmarks.server_process import MODELS, serving
from ntm import Client
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from tests.valkey import ValkeyServer

NUM_SESSIONS, NUM_SLOTS, NUM_TOGETHER = 100_000, 256, 64
NUM_HAND_OVERS = 400
NUM_KILLS = 5


def compare(num_rounds: int, duration_s: float) -> Figures:
    """Measure all three."""
    return {**_paging(num_rounds, duration_s), **_hand_over(), **_take_over()}


def _paging(num_rounds: int, duration_s: float) -> Figures:
    """Single steps of 64 sessions in a message: always the same, and any of 100,000 of which 256 have a slot."""
    with TemporaryDirectory(prefix="ntm-paging-") as directory:
        store = f"sqlite:///{directory}/sessions.sqlite3"
        with serving(MODELS, "--max-resident-sessions", str(NUM_SLOTS), store=store) as (address, _):
            ids = create_and_step(address, NUM_SESSIONS, sessions_per_batch=NUM_SLOTS)
            cases = {
                f"{NUM_SESSIONS} sessions, {NUM_SLOTS} slots, {NUM_TOGETHER} of {who}": _BatchesOf(
                    address, some, duration_s
                ).measure
                for who, some in (("the resident", ids[-NUM_TOGETHER:]), ("all", ids))
            }
            return side_by_side(cases, num_rounds)


class _BatchesOf:
    """BatchSteps of random sessions, one after another."""

    def __init__(self, address: str, ids: list[str], duration_s: float) -> None:
        self._stub = session_service_pb2_grpc.SessionServiceStub(grpc.insecure_channel(address))
        self._ids, self._duration_s = ids, duration_s
        self._random = np.random.default_rng(0)
        self._inputs = to_message(np.zeros((NUM_TOGETHER, 1, INPUT_SIZE), np.float32))

    def measure(self) -> Metrics:
        latencies_s: list[float] = []
        end_s = monotonic() + self._duration_s
        while monotonic() < end_s:
            chosen = self._random.choice(len(self._ids), NUM_TOGETHER, replace=False)
            request = pb.BatchStepRequest(session_ids=[self._ids[i] for i in chosen], inputs=self._inputs)
            start_s = perf_counter()
            answer = self._stub.BatchStep(request)
            latencies_s.append(perf_counter() - start_s)
            if answer.errors:
                raise RuntimeError(f"a session failed: {answer.errors[0].message}")
        return {
            "steps_per_s": NUM_TOGETHER * len(latencies_s) / sum(latencies_s),
            **_percentiles(latencies_s),
        }


@contextmanager
def _replicas() -> Iterator[tuple[str, str, list[int]]]:
    """Two servers on one Valkey, with the default lease: their addresses, and the ids of their processes."""
    with TemporaryDirectory(prefix="ntm-replicas-") as directory:
        valkey = ValkeyServer(Path(directory))
        valkey.start()
        try:
            with (
                serving(MODELS, "--sync", "normal", store=valkey.url) as (one, pids),
                serving(MODELS, "--sync", "normal", store=valkey.url) as (other, more),
            ):
                yield one, other, [*pids, *more]
        finally:
            valkey.kill()


def _hand_over() -> Figures:
    """A session is called at one replica and then at the other, in turn, with single steps."""
    latencies_s = []
    with _replicas() as (one, other, _), Client(one) as first, Client(other) as second:
        sessions = [first.session("copy") for _ in range(10)]
        for _ in range(NUM_HAND_OVERS // len(sessions)):
            for session in sessions:
                session.step(np.zeros(INPUT_SIZE))
            sessions = [second.attach(session.session_id) for session in sessions]
            first, second = second, first
            for session in sessions:
                start_s = perf_counter()
                session.step(np.zeros(INPUT_SIZE))
                latencies_s.append(perf_counter() - start_s)
    return {"hand-over between live replicas": _figures(latencies_s)}


def _take_over() -> Figures:
    """A replica is killed, and its session called at the other at once."""
    latencies_s = []
    for _ in range(NUM_KILLS):
        with _replicas() as (one, other, pids), Client(one) as first, Client(other) as second:
            session = first.session("copy")
            session.run(np.zeros((40, INPUT_SIZE)))
            os.kill(pids[0], signal.SIGKILL)
            start_s = perf_counter()
            second.attach(session.session_id).step(np.zeros(INPUT_SIZE))
            latencies_s.append(perf_counter() - start_s)
    return {"take-over after kill -9": _figures(latencies_s)}


def _figures(latencies_s: list[float]) -> dict[str, Figure]:
    return {
        metric: Figure(value, 1e3 * min(latencies_s), 1e3 * max(latencies_s))
        for metric, value in _percentiles(latencies_s).items()
    }


def _percentiles(latencies_s: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": 1e3 * float(np.percentile(latencies_s, p)) for p in (50, 99)}
