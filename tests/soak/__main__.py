"""`python -m tests.soak`: half an hour of callers who come and go, over TLS, as two principals, on one server.

Each principal has sessions that go on for good, more than fit in memory, and others that it makes, steps, forks and
ends; every answer is held against what it must be. The server's certificate is replaced every few minutes. Memory, open
files, threads and the store are told every minute, and must not grow from the second quarter to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ntm import AsyncClient, Tls
from server.security.tokens import line_of
from tests import step_models
from tests.conftest import ServerProcess
from tests.server.helpers import accumulated, random_inputs
from tests.server.security.authority import Authority

_TOKENS = {"alice": "a-token", "bob": "b-token"}
_LASTING = 24
_COMING_AND_GOING = 4
_STEPS = 64
_PAUSE_S = 0.2
"""Between two calls of a caller: the machine may have other work to do."""
_NEW_CERTIFICATE_EVERY_S = 120.0


@dataclass(frozen=True)
class Sample:
    """What the server takes at one time."""

    minute: float
    memory_mib: float
    num_files: int
    num_threads: int
    store_mib: float
    num_calls: int

    def __str__(self) -> str:
        return (
            f"| {self.minute:.0f} | {self.memory_mib:.0f} | {self.num_files} | {self.num_threads} | "
            f"{self.store_mib:.1f} | {self.num_calls} |"
        )


class Principal:
    """One principal's callers."""

    def __init__(self, name: str, address: str, authority: Path) -> None:
        self._name = name
        self._client = AsyncClient(address, tls=Tls(authority), token=_TOKENS[name], retry_for_s=60)
        self._chance = random.Random(name)
        self.num_calls = 0

    async def call_until(self, end_s: float) -> None:
        """Call; raises where an answer is not what it must be."""
        async with self._client, asyncio.TaskGroup() as callers:
            for number in range(_LASTING):
                callers.create_task(self._last(number, end_s))
            for number in range(_COMING_AND_GOING):
                callers.create_task(self._come_and_go(number, end_s))

    async def _last(self, number: int, end_s: float) -> None:
        """One session, stepped and reset again and again."""
        inputs = random_inputs(_STEPS, number)
        expected = accumulated(inputs)
        session = await self._client.session("accumulator", session_id=f"lasting-{number}")
        step = 0
        while time.monotonic() < end_s:
            if step == len(inputs):
                await session.reset()
                step = 0
            end = min(len(inputs), step + self._chance.randint(1, 4))
            outputs = await session.run(inputs[step:end])
            np.testing.assert_array_equal(outputs, expected[step:end])
            step = end
            await self._pause(2)

    async def _come_and_go(self, number: int, end_s: float) -> None:
        """Sessions that are made, stepped, forked and ended."""
        inputs = random_inputs(8, number)
        while time.monotonic() < end_s:
            session = await self._client.session("accumulator")
            outputs = await session.run(inputs[:4])
            np.testing.assert_array_equal(outputs, accumulated(inputs)[:4])
            fork = await session.fork()
            np.testing.assert_array_equal(await fork.run(inputs[4:]), accumulated(inputs)[4:])
            await fork.delete()
            await session.delete()
            self.num_calls += 4
            await self._pause(1)

    async def _pause(self, times: float) -> None:
        self.num_calls += 1
        await asyncio.sleep(times * _PAUSE_S * self._chance.uniform(0.5, 1.5))


async def soak(directory: Path, minutes: float) -> list[Sample]:
    """Run it; returns what was seen every minute."""
    authority = Authority()
    authority_path = authority.write(directory)
    certificate, key = authority.issue("server").write(directory, "server")
    models, store = directory / "models", directory / "sessions.sqlite3"
    step_models.write(models, step_models.accumulator(), "accumulator")
    tokens = directory / "tokens"
    tokens.write_text("\n".join(line_of(name, token) for name, token in _TOKENS.items()))
    flags = [
        "--tls-cert",
        f"{certificate}",
        "--tls-key",
        f"{key}",
        "--tokens",
        f"{tokens}",
        "--sync",
        "normal",
    ]
    flags += [
        "--max-resident-sessions",
        "32",
        "--max-sessions-per-principal",
        "64",
        "--max-retired-ids",
        "1000",
    ]
    server = ServerProcess(models, *flags, store=f"sqlite:///{store}")
    server.forget_the_log()
    watched, begin_s = psutil.Process(server.pid), time.monotonic()
    end_s = begin_s + 60 * minutes
    principals = [Principal(name, server.address, authority_path) for name in _TOKENS]

    def sample() -> Sample:
        return Sample(
            (time.monotonic() - begin_s) / 60,
            watched.memory_info().rss / 2**20,
            watched.num_fds(),
            watched.num_threads(),
            sum(path.stat().st_size for path in directory.glob(f"{store.name}*")) / 2**20,
            sum(principal.num_calls for principal in principals),
        )

    async def replace_certificate() -> None:
        while True:
            await asyncio.sleep(_NEW_CERTIFICATE_EVERY_S)
            authority.issue("server").write(directory, "server")

    samples: list[Sample] = []

    async def look() -> None:
        while time.monotonic() < end_s:
            await asyncio.sleep(min(60.0, 60 * minutes / 20))
            samples.append(sample())
            print(samples[-1], flush=True)

    replacing = asyncio.ensure_future(replace_certificate())
    try:
        await asyncio.gather(look(), *(principal.call_until(end_s) for principal in principals))
    finally:
        replacing.cancel()
        server.stop()
    return samples


def growth(samples: list[Sample]) -> dict[str, float]:
    """By what each has grown from the second quarter to the last, as a part of it."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        name: float(
            np.mean([getattr(s, name) for s in last]) / np.mean([getattr(s, name) for s in second]) - 1
        )
        for name in ("memory_mib", "num_files", "num_threads", "store_mib")
    }


def main() -> int:
    """Returns the exit status: 0 if nothing has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (30)")
    options = parser.parse_args()
    print(
        "| Minute | MiB | open files | threads | store, MiB | calls |\n|---|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as directory:
        samples = asyncio.run(soak(Path(directory), options.minutes))
    grown = growth(samples)
    print("\nFrom the second quarter to the last: " + ", ".join(f"{k} {v:+.1%}" for k, v in grown.items()))
    return 0 if all(share < 0.05 for share in grown.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
