"""Routing: what a message costs that finds its replica by the client's own hash, and one that passes through Envoy.

    python -m benchmarks.routing

Two servers, without a store, and the project's asyncio client; processor time is that of all processes: the
client's, the servers' and Envoy's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter, process_time

import numpy as np
import psutil

from benchmarks.measuring import Case, Figures, Metrics, side_by_side
from benchmarks.peers import envoy
from benchmarks.peers.naive import INPUT_SIZE
from benchmarks.server_process import MODELS, serving
from ntm import AsyncClient, AsyncSession
from ntm.tensor import Array

NUM_SERVERS = 2
NUM_SESSIONS = 16
_INPUTS = np.zeros((1, INPUT_SIZE), np.float32)


def compare(num_rounds: int, duration_s: float) -> Figures:
    """Single steps of 16 sessions, as calls and as streams, on both ways."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(MODELS)) for _ in range(NUM_SERVERS)]
        addresses = [address for address, _ in servers]
        server_pids = [pid for _, pids in servers for pid in pids]
        router, envoy_pid = stack.enter_context(envoy.routing(addresses))
        runner = stack.enter_context(asyncio.Runner())
        cases: dict[str, Case] = {}
        for rpc in ("Step", "StreamSteps"):
            for way, address, envoy_pids in (
                ("the client's own routing", addresses, []),
                ("through Envoy", router, [envoy_pid]),
            ):
                load = Load(runner, address, rpc, duration_s, server_pids, envoy_pids)
                stack.callback(load.close)
                cases[f"{NUM_SESSIONS} sessions, {rpc}, T=1, {way}"] = load.measure
        return side_by_side(cases, num_rounds)


class Load:
    """Sessions that step as fast as they are answered, one message of each under way."""

    def __init__(
        self,
        runner: asyncio.Runner,
        address: str | list[str],
        rpc: str,
        duration_s: float,
        server_pids: list[int],
        envoy_pids: list[int],
    ) -> None:
        self._runner = runner
        self._rpc = rpc
        self._duration_s = duration_s
        self._processes = {
            "servers": [psutil.Process(pid) for pid in server_pids],
            "envoy": [psutil.Process(pid) for pid in envoy_pids],
        }
        self._client, self._sessions = runner.run(self._open(address))

    def measure(self) -> Metrics:
        before = self._cpu_s()
        latencies_s = self._runner.run(self._load())
        after = self._cpu_s()
        num_messages = len(latencies_s)
        spent_us = {who: 1e6 * (after[who] - before[who]) / num_messages for who in before}
        return {
            "steps_per_s": num_messages / self._wall_s,
            "p50_ms": 1e3 * float(np.percentile(latencies_s, 50)),
            "p99_ms": 1e3 * float(np.percentile(latencies_s, 99)),
            "cpu_us_per_step": sum(spent_us.values()),
            **{f"{who}_cpu_us_per_step": value for who, value in spent_us.items()},
        }

    def close(self) -> None:
        self._runner.run(self._client.close())

    async def _open(self, address: str | list[str]) -> tuple[AsyncClient, list[AsyncSession]]:
        client = AsyncClient(address)
        return client, [await client.session("copy") for _ in range(NUM_SESSIONS)]

    async def _load(self) -> list[float]:
        latencies_s: list[float] = []
        start_s = perf_counter()
        work = self._call if self._rpc == "Step" else self._stream
        await asyncio.gather(
            *(work(session, start_s + self._duration_s, latencies_s) for session in self._sessions)
        )
        self._wall_s = perf_counter() - start_s
        return latencies_s

    async def _call(self, session: AsyncSession, end_s: float, latencies_s: list[float]) -> None:
        while (asked_s := perf_counter()) < end_s:
            await session.run(_INPUTS)
            latencies_s.append(perf_counter() - asked_s)

    async def _stream(self, session: AsyncSession, end_s: float, latencies_s: list[float]) -> None:
        asked_s = perf_counter()

        def chunks() -> Iterator[Array]:
            nonlocal asked_s
            while (asked_s := perf_counter()) < end_s:
                yield _INPUTS

        async for _ in session.stream(chunks(), max_in_flight=1):
            latencies_s.append(perf_counter() - asked_s)

    def _cpu_s(self) -> dict[str, float]:
        """Processor seconds so far, by who spent them."""
        spent = {
            who: sum(sum(process.cpu_times()[:2]) for process in processes)
            for who, processes in self._processes.items()
        }
        return {"client": process_time(), **spent}


def main() -> None:
    """Measure, print and write down."""
    from rich.console import Console

    from benchmarks import report

    report.keep("routing", compare(num_rounds=5, duration_s=2.0), Console())


if __name__ == "__main__":
    main()
