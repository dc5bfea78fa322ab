"""Neighbours: callers who behave, and what they get while others do not.

They send at a fixed rate, whatever becomes of it, so that a server that stalls is seen to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter

import grpc
import numpy as np

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from ntm.v1 import session_service_pb2_grpc

NUM_SESSIONS = 8
CALLS_PER_S = 200
PATIENCE_S = 0.25
"""An answer that takes longer does not count."""


@dataclass(frozen=True)
class Lot:
    """What became of the calls of one span of time."""

    num_sent: int
    num_good: int
    """Answered in time, with the right bits."""
    num_wrong: int
    """Answered with other bits."""
    p99_ms: float

    @property
    def goodput(self) -> float:
        """Between 0 and 1."""
        return self.num_good / max(1, self.num_sent)


def keep_calling(
    address: str, token: str, expected: np.ndarray, inputs: np.ndarray, tell: Connection
) -> None:
    """Call until told to stop; for each other message, tell what became of the calls since the last.

    Args:
        address: of the server.
        token: of the neighbours' principal; "" for none.
        expected: [T, 8], what one session of the copy model answers to `inputs`.
        inputs: [T, 9], sent one step a call by each session; one that was not answered is sent again.
        tell: "lot" asks, anything else ends it.
    """
    asyncio.run(_Neighbours(address, token, expected, inputs, tell).run())


class _Neighbours:
    def __init__(
        self, address: str, token: str, expected: np.ndarray, inputs: np.ndarray, tell: Connection
    ) -> None:
        self._address, self._tell = address, tell
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self._expected, self._inputs = expected, inputs
        self._num_sent = 0
        self._good_s: list[float] = []
        self._num_wrong = 0

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            self._stub = session_service_pb2_grpc.SessionServiceStub(channel)  # type: ignore[no-untyped-call]
            lanes = [asyncio.ensure_future(self._lane(number)) for number in range(NUM_SESSIONS)]
            while await asyncio.to_thread(self._tell.recv) == "lot":
                self._tell.send(self._lot())
            for lane in lanes:
                lane.cancel()
            await asyncio.wait(lanes)

    def _lot(self) -> Lot:
        times_s = sorted([*self._good_s, *[np.inf] * (self._num_sent - len(self._good_s))])
        p99_s = times_s[int(0.99 * (len(times_s) - 1))] if times_s else np.nan
        lot = Lot(self._num_sent, len(self._good_s), self._num_wrong, 1e3 * p99_s)
        self._num_sent, self._good_s, self._num_wrong = 0, [], 0
        return lot

    async def _lane(self, number: int) -> None:
        """One session's calls, at its part of the rate; one that is late is not made up for."""
        interval_s = NUM_SESSIONS / CALLS_PER_S
        session_id, step = f"neighbour-{number}", 0
        create = pb.CreateSessionRequest(model_name="copy", session_id=session_id, request_id=session_id)
        await self._stub.CreateSession(create, metadata=self._metadata, wait_for_ready=True)
        due_s = perf_counter() + number / CALLS_PER_S
        while step < len(self._inputs):
            await asyncio.sleep(max(0.0, due_s - perf_counter()))
            began_s = perf_counter()
            self._num_sent += max(1, int((began_s - due_s) / interval_s))  # those that were not sent, too
            due_s = max(due_s + interval_s, began_s)
            request = pb.StepRequest(
                session_id=session_id, inputs=to_message(self._inputs[step : step + 1]), first_step=step
            )
            try:
                answer = await self._stub.Step(request, metadata=self._metadata, timeout=5.0)
            except grpc.RpcError:
                continue
            if to_array(answer.outputs).tobytes() != self._expected[step : step + 1].tobytes():
                self._num_wrong += 1
            elif perf_counter() - began_s <= PATIENCE_S:
                self._good_s.append(perf_counter() - began_s)
            step += 1
