"""Growth: how the cost of a step grows with the sessions alive, the steps of a message and the rows of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import psutil

from benchmarks import step_graph
from benchmarks.bare import BareLoop
from benchmarks.measuring import Case, Figure, Figures, side_by_side
from benchmarks.peers.naive import INPUT_SIZE
from benchmarks.server_process import MODELS, Shape, serving
from benchmarks.serving import LoadCase
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc

NUM_LIVE_SESSIONS = (100, 1_000, 10_000, 100_000)
NUM_STEPS = (1, 10, 100, 1000)
NUM_MEMORY_ROWS = (128, 256, 512, 1024, 2048, 4096)

_STEPPING = Shape("BatchStep", 64, 8)
_SESSIONS_PER_BATCH = 1000
_STEPS_OF_EACH = 16
_MEMORY_BATCH_SIZE = 16


def compare(num_rounds: int, duration_s: float) -> Figures:
    """Measure all three."""
    return {
        **_by_live_sessions(num_rounds, duration_s),
        **_by_steps(num_rounds, duration_s),
        **_by_memory_rows(num_rounds, duration_s),
    }


def live_sessions(num_sessions: int) -> str:
    """The name of the case with so many sessions alive."""
    return f"{num_sessions} live sessions"


def steps(num_steps: int) -> str:
    """The name of the case with so many steps in a message."""
    return f"{num_steps} steps in a message"


def memory_rows(num_rows: int) -> str:
    """The name of the case with so large a memory."""
    return f"{num_rows} rows of memory"


def _by_live_sessions(num_rounds: int, duration_s: float) -> Figures:
    """64 of the sessions step; all of them have stepped, so that each has its state."""
    figures: Figures = {}
    with serving(MODELS, "--max-resident-sessions", str(2 * max(NUM_LIVE_SESSIONS))) as (address, pids):
        stepping = LoadCase.on_sessions(address, pids, _STEPPING, duration_s)
        # Resident memory tells how much a session takes once some have come: before, it is what the server had.
        num_alive, first_bytes = _STEPPING.num_sessions, psutil.Process(pids[0]).memory_info().rss
        for target in NUM_LIVE_SESSIONS:
            create_and_step(address, target - num_alive)
            num_alive = target
            case = live_sessions(target)
            figures |= side_by_side({case: stepping.measure}, num_rounds)
            num_bytes = psutil.Process(pids[0]).memory_info().rss - first_bytes
            per_session = num_bytes / (target - _STEPPING.num_sessions)
            figures[case]["bytes_per_session"] = Figure(per_session, per_session, per_session)
    return figures


def _by_steps(num_rounds: int, duration_s: float) -> Figures:
    with serving(MODELS) as (address, pids):
        cases: dict[str, Case] = {
            steps(count): LoadCase.on_sessions(
                address, pids, Shape("BatchStep", 8, count), duration_s
            ).measure
            for count in NUM_STEPS
        }
        return side_by_side(cases, num_rounds)


def _by_memory_rows(num_rounds: int, duration_s: float) -> Figures:
    def cases() -> Iterator[tuple[str, Case]]:
        for count in NUM_MEMORY_ROWS:
            model = step_graph.models(memory_rows=count, row_width=20)["exported"]
            yield memory_rows(count), partial(BareLoop(model, _MEMORY_BATCH_SIZE).measure, duration_s)

    return side_by_side(dict(cases()), num_rounds)


def create_and_step(
    address: str, num_sessions: int, sessions_per_batch: int = _SESSIONS_PER_BATCH
) -> list[str]:
    """Create sessions and take a few steps with each; returns their ids."""
    request, ids = pb.CreateSessionRequest(model_name="copy"), []
    with grpc.insecure_channel(address) as channel:
        stub = session_service_pb2_grpc.SessionServiceStub(channel)
        waiting: deque[Any] = deque()
        for _ in range(num_sessions):
            waiting.append(stub.CreateSession.future(request))
            if len(waiting) == 64:
                ids.append(waiting.popleft().result().session.session_id)
        ids += [call.result().session.session_id for call in waiting]
        for start in range(0, len(ids), sessions_per_batch):
            some = ids[start : start + sessions_per_batch]
            inputs = to_message(np.zeros((len(some), _STEPS_OF_EACH, INPUT_SIZE), np.float32))
            answer = stub.BatchStep(pb.BatchStepRequest(session_ids=some, inputs=inputs))
            if answer.errors:
                raise RuntimeError(f"a session failed: {answer.errors[0].message}")
    return ids
