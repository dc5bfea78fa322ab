"""Load that knows what it must get: many sessions that step all the time, and an account of every step afterwards.

Each session sends its own random inputs, from one to three steps a message, through the project's client. When the load
has ended, its steps are counted again on the server and computed again, undisturbed, in fresh sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from ntm import AsyncClient, AsyncSession, ClientError
from ntm.tensor import Array

MODEL = "copy"
NUM_SESSIONS = 20
NUM_STREAMS = 5
"""How many of the sessions are streams; the others make calls."""
PAUSE_S = 0.04
MAX_STEPS = 20_000


@dataclass
class Account:
    """What became of a load."""

    answered: int = 0
    """Steps answered."""
    calls: int = 0
    failed: list[str] = field(default_factory=list)
    """Calls that ended in an error for the caller, after all repeats."""
    lost: int = 0
    """Steps that were answered and that the server does not have."""
    doubled: int = 0
    """Steps that the server has and nobody was answered."""
    wrong: int = 0
    """Steps whose outputs are not, bit for bit, those of an undisturbed session."""
    longest_s: float = 0.0
    """The longest that a caller waited for an answer."""

    @property
    def is_clean(self) -> bool:
        """Nothing failed, lost, doubled or wrong."""
        return not (self.failed or self.lost or self.doubled or self.wrong)


class Load:
    """Sessions under way at one address."""

    def __init__(self, client: AsyncClient, sessions: list[AsyncSession]) -> None:
        self._client = client
        self._sessions = sessions
        width = sessions[0].model.spec.inputs[0].shape[0]
        generator = np.random.default_rng(7)
        self._inputs = generator.integers(0, 2, (len(sessions), MAX_STEPS, width)).astype(np.float32)
        self._sizes = generator.integers(1, 4, (len(sessions), MAX_STEPS))
        self._outputs: list[list[Array]] = [[] for _ in sessions]
        self._stopping = False
        self.account = Account()

    @property
    def session_ids(self) -> list[str]:
        return [session.session_id for session in self._sessions]

    def begin(self) -> None:
        """Set every session to work."""
        self._tasks = [
            asyncio.create_task(self._stream(index) if index < NUM_STREAMS else self._call(index))
            for index in range(len(self._sessions))
        ]

    async def end(self) -> Account:
        """Stop when each has its answer, and settle the account."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        answered = [sum(map(len, outputs)) for outputs in self._outputs]
        for session, count in zip(self._sessions, answered, strict=True):
            counter = (await self._client.attach(session.session_id)).next_step
            self.account.lost += max(0, count - counter)
            self.account.doubled += max(0, counter - count)
        self.account.answered = sum(answered)
        await self._compare(answered)
        return self.account

    async def _call(self, index: int) -> None:
        session = self._sessions[index]
        for size in self._sizes[index]:
            if self._stopping:
                return
            start = session.next_step
            asked_s = monotonic()
            try:
                outputs = await session.run(self._inputs[index, start : start + size])
            except ClientError as error:
                self.account.failed.append(f"{type(error).__name__}: {error}")
            else:
                self._outputs[index].append(outputs)
            self._count(asked_s)
            await asyncio.sleep(PAUSE_S)

    async def _stream(self, index: int) -> None:
        session = self._sessions[index]
        asked_s = monotonic()

        async def chunks() -> AsyncIterator[Array]:
            nonlocal asked_s
            start = 0
            for size in self._sizes[index]:
                if self._stopping:
                    return
                await asyncio.sleep(PAUSE_S)
                asked_s = monotonic()
                yield self._inputs[index, start : start + size]
                start += size

        try:
            async for outputs in session.stream(chunks(), max_in_flight=1):
                self._outputs[index].append(outputs)
                self._count(asked_s)
        except ClientError as error:
            self.account.failed.append(f"{type(error).__name__}: {error}")

    def _count(self, asked_s: float) -> None:
        self.account.calls += 1
        self.account.longest_s = max(self.account.longest_s, monotonic() - asked_s)

    async def _compare(self, answered: list[int]) -> None:
        for index, count in enumerate(answered):
            async with await self._client.session(MODEL) as undisturbed:
                expected = await undisturbed.run(self._inputs[index, :count])
            got = np.concatenate([expected[:0], *self._outputs[index]])
            self.account.wrong += int((got != expected).any(axis=1).sum())


@asynccontextmanager
async def load(address: str, credentials: dict[str, Any]) -> AsyncIterator[Load]:
    """Sessions at work from the start of the block; call `end` in it for the account."""
    async with AsyncClient(address, retry_for_s=60.0, **credentials) as client:
        sessions = [await client.session(MODEL) for _ in range(NUM_SESSIONS)]
        running = Load(client, sessions)
        running.begin()
        try:
            yield running
        finally:
            running._stopping = True
            for task in running._tasks:
                task.cancel()
            await asyncio.gather(*running._tasks, return_exceptions=True)
