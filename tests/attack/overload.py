"""Overload: more than the server can do, from many callers of one step each, and what it still does of it.

The model is made slow, so that ten times of what the server can do may be asked for from the same machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

import grpc
import numpy as np
from onnx import TensorProto, helper

from benchmarks.http2 import Connection, LoadError, exchange
from benchmarks.load import quantile
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc
from tests import step_models

NUM_SESSIONS = 4096
FLAGS = ("--max-resident-sessions", f"{NUM_SESSIONS}", "--max-batch-size", "8", "--max-queue-wait-s", "0.06")
"""What a service sets whose callers wait for their answers."""
LEAST_GOODPUT = 0.8
"""Of the peak, at ten times of it."""
MOST_P99 = 5.0
"""Of what is answered then, by that at half of the peak."""
RECOVERS_WITHIN_S = 1.0
_NUM_CALLERS = 256
_NUM_CONNECTIONS = 8
_STEP = "/ntm.v1.SessionService/Step"


def slow_model(num_turns: int = 4000) -> bytes:
    """h' = tanh(h W) again and again, after x was added; y = h'."""
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["goes_on"]),
            helper.make_node("MatMul", ["h", "w"], ["hw"]),
            helper.make_node("Tanh", ["hw"], ["next_h"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_h", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Add", ["sum", "x"], ["begin"]),
        helper.make_node("Tile", ["begin", "repeats"], ["wide"]),
        helper.make_node("Loop", ["num_turns", "", "wide"], ["end"], body=turn),
        helper.make_node("Slice", ["end", "zero", "width", "one"], ["next_sum"]),
        helper.make_node("Identity", ["next_sum"], ["y"]),
    ]
    constants = {
        "num_turns": np.array(num_turns),
        "repeats": np.array([1, 64]),
        "w": (np.random.default_rng(0).normal(size=(192, 192)) / 14).astype(np.float32),
        "zero": np.array([0]),
        "width": np.array([3]),
        "one": np.array([1]),
    }
    return step_models.model(nodes, [step_models.vector_state("sum")], constants)


class _Tolerant(Connection):
    """A connection on which a call may fail: it ends then without a message."""

    def _check_trailers(self, block: bytes) -> None:
        try:
            super()._check_trailers(block)
        except LoadError as error:
            if error.status is None:
                raise
            self._good_trailers.add(block)


@dataclass(frozen=True)
class Offered:
    """What became of the calls of one load."""

    asked_per_s: float
    sent_per_s: float
    good_per_s: float
    """Answered."""
    refused_per_s: float
    p99_ms: float
    """Of what was answered."""
    good_after_s: float
    """When the first tenth of a second began of whose calls that ended nine of ten were answered."""


def sessions_of(address: str) -> list[bytes]:
    """The requests of one step for each of many sessions."""
    inputs = to_message(np.ones((1, 3), np.float32) / 100)
    payloads = []
    with grpc.insecure_channel(address) as channel:
        stub = session_service_pb2_grpc.SessionServiceStub(channel)  # type: ignore[no-untyped-call]
        for number in range(NUM_SESSIONS):
            session_id = f"overload-{number}"
            stub.CreateSession(pb.CreateSessionRequest(model_name="slow", session_id=session_id))
            payloads.append(pb.StepRequest(session_id=session_id, inputs=inputs).SerializeToString())
    return payloads


def peak_of(address: str, payloads: Sequence[bytes], seconds: float) -> float:
    """Steps a second, from many callers of whom each waits for its answer."""
    with closing(_Load(address, payloads[:_NUM_CALLERS])) as load:
        load.keep_all_busy(seconds / 4)
        num_before, begin_s = load.num_good, perf_counter()
        load.keep_all_busy(seconds)
        return (load.num_good - num_before) / (perf_counter() - begin_s)


def offer(address: str, payloads: Sequence[bytes], per_s: float, seconds: float) -> Offered:
    """Ask for steps at a rate, whatever becomes of them, from callers of whom each has one call at a time."""
    with closing(_Load(address, payloads)) as load:
        begin_s = now_s = perf_counter()
        while now_s < begin_s + seconds:
            num_due = int((now_s - begin_s) * per_s) - load.num_sent - load.num_not_sent
            for _ in range(num_due):
                load.send(now_s)
            now_s = load.take(1e-3)
        return Offered(
            per_s,
            load.num_sent / seconds,
            load.num_good / seconds,
            load.num_refused / seconds,
            1e3 * quantile(sorted(load.latencies_s), 0.99) if load.latencies_s else np.nan,
            load.good_after_s(begin_s),
        )


class _Load:
    """Callers, the free ones in a queue, on few connections."""

    def __init__(self, address: str, payloads: Sequence[bytes]) -> None:
        self._connections = [_Tolerant(address) for _ in range(_NUM_CONNECTIONS)]
        self._free = deque(enumerate(payloads))
        self.num_sent = self.num_not_sent = self.num_good = self.num_refused = 0
        self.latencies_s: list[float] = []
        self._ends: list[tuple[float, bool]] = []

    def send(self, now_s: float) -> None:
        """A free caller's next call; none is free where the server answers nobody."""
        if not self._free:
            self.num_not_sent += 1
            return
        number, payload = self._free.popleft()
        connection = self._connections[number % _NUM_CONNECTIONS]
        stream = connection.open(_STEP, [number, payload, now_s, False])
        connection.send(stream, payload, ends=True)
        self.num_sent += 1

    def take(self, timeout_s: float | None) -> float:
        """Take in what has come; returns the time."""
        now_s, events = exchange(self._connections, timeout_s)
        for stream, message in events:
            owner = stream.owner
            if message is not None:
                owner[3] = True
                continue
            number, payload, sent_s, is_good = owner
            self._free.append((number, payload))
            self._ends.append((now_s, is_good))
            self.num_good += is_good
            self.num_refused += not is_good
            if is_good:
                self.latencies_s.append(now_s - sent_s)
        return perf_counter()

    def keep_all_busy(self, seconds: float) -> None:
        """Let every caller call again as soon as it is answered."""
        end_s = perf_counter() + seconds
        while (now_s := perf_counter()) < end_s:
            while self._free:
                self.send(now_s)
            self.take(1e-2)

    def good_after_s(self, begin_s: float) -> float:
        """When the first tenth of a second began of whose calls that ended nine of ten were answered."""
        tenths: dict[int, list[bool]] = {}
        for end_s, is_good in self._ends:
            tenths.setdefault(int((end_s - begin_s) * 10), []).append(is_good)
        good = [tenth for tenth, ends in sorted(tenths.items()) if sum(ends) >= 0.9 * len(ends)]
        return good[0] / 10 if good else np.inf

    def close(self) -> None:
        """Leave."""
        for connection in self._connections:
            connection.close()
