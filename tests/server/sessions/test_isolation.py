"""No session can alter a bit of another's results, whoever shares its batches: the shipped model, a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from ntm import AsyncClient, Client
from tests.conftest import ROOT, ServerProcess

NUM_SESSIONS = 64


@pytest.fixture
def address(start_server: Callable[..., ServerProcess]) -> str:
    return start_server(ROOT / "models", "--max-batch-size", "32").address


def random_inputs(seed: int) -> np.ndarray:
    """The inputs of one session, of a length of its own."""
    generator = np.random.default_rng(seed)
    return generator.uniform(0, 1, (generator.integers(5, 60), 9)).astype(np.float32)


def alone(address: str, inputs: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a session gives with the server to itself."""
    with Client(address) as client, client.session("copy") as session:
        return session.run(inputs), session.state()


async def together(
    address: str, seed: int, barrier: asyncio.Barrier
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a session gives among others, in messages of random sizes."""
    inputs, sizes = random_inputs(seed), np.random.default_rng(1000 + seed)
    async with AsyncClient(address) as client, await client.session("copy") as session:
        await barrier.wait()
        outputs = []
        while session.next_step < len(inputs):
            size = int(sizes.integers(1, 20))
            outputs.append(await session.run(inputs[session.next_step :][:size]))
        return np.concatenate(outputs), await session.state()


async def test_64_concurrent_sessions_give_bit_for_bit_what_each_gives_alone(address: str) -> None:
    barrier = asyncio.Barrier(NUM_SESSIONS)

    results = await asyncio.gather(*(together(address, seed, barrier) for seed in range(NUM_SESSIONS)))

    for seed, (outputs, state) in enumerate(results):
        expected_outputs, expected_state = await asyncio.to_thread(alone, address, random_inputs(seed))
        assert outputs.tobytes() == expected_outputs.tobytes(), seed
        for name, value in state.items():
            assert value.tobytes() == expected_state[name].tobytes(), (seed, name)


def test_the_shipped_model_needs_no_padding(address: str) -> None:
    with Client(address) as client:
        execution = client.model("copy").execution

    assert execution.batch_invariant
    assert execution.padded_batch_size == 0
