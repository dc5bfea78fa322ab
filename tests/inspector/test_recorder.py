"""The recorder: forks from any moment are exact, whoever sent the steps and however they began."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from inspector.errors import BadRequestError, NotFoundError
from inspector.recorder import Recorder, Recording
from inspector.sequences import Sequence
from ntm import AsyncClient
from tests.conftest import ServerProcess

PLENTY = 2**24


@asynccontextmanager
async def recording_of(
    address: str, model: str, limit_bytes: int = PLENTY
) -> AsyncIterator[tuple[Recorder, Recording, AsyncClient]]:
    async with AsyncClient(address) as client:
        recorder = Recorder(client, [], limit_bytes)
        yield recorder, await recorder.create(model), client


def sequence(num_steps: int, seed: int = 0) -> Sequence:
    inputs = np.random.default_rng(seed).uniform(0.1, 1, (num_steps, 3)).astype(np.float32)
    return Sequence("random", inputs, None, False, "")


async def is_exact(recorder: Recorder, recording: Recording) -> None:
    """A fork from each moment has the recorded states, bit for bit, and the moment's counter."""
    for moment in range(recording.num_steps + 1):
        fork = await recorder.fork(recording, moment)
        assert fork.session.next_step == recording.first_step + moment
        for name, array in (await fork.session.state()).items():
            recorded = recording.states[name].rows()[moment]
            if recorded.dtype.kind != "f" or not np.isnan(recorded).any():
                np.testing.assert_array_equal(array, recorded, err_msg=f"{name} at {moment}")
        await fork.session.delete()


@pytest.mark.parametrize("model", ["accumulator", "delay_line", "many_layouts"])
async def test_a_fork_from_any_moment_is_exact_across_resets(
    start_server: Callable[..., ServerProcess], models: Path, model: str
) -> None:
    async with recording_of(start_server(models).address, model) as (recorder, recording, _):
        recording.set_sequence(sequence(3))
        await recorder.advance(recording, 10)
        await recording.reset()
        recording.set_sequence(sequence(4, seed=1))
        await recorder.advance(recording, 2)
        await recorder.advance(recording, 2)

        assert recording.num_steps == 7
        await is_exact(recorder, recording)


async def test_steps_of_others_are_forked_exactly_also_those_that_began_anew(
    start_server: Callable[..., ServerProcess], models: Path
) -> None:
    address = start_server(models).address
    async with recording_of(address, "accumulator") as (recorder, recording, client):
        told = recorder.follow(recording)
        await anext(told)
        other = await client.attach(recording.session.session_id)
        inputs = sequence(5).inputs
        await other.run(inputs[:1])
        await other.run(inputs[1:4], [False, True, False])
        await other.run(inputs[4:])
        for _ in range(3):
            assert await anext(told) == 0
        await told.aclose()

        assert recording.num_steps == 5
        assert np.isnan(recording.states["sum"].rows()[2]).all()
        np.testing.assert_array_equal(recording.states["sum"].rows()[5], (await other.state())["sum"])
        await is_exact(recorder, recording)


async def test_a_recording_that_is_full_begins_anew_and_others_are_forgotten_first(
    start_server: Callable[..., ServerProcess], models: Path
) -> None:
    address = start_server(models).address
    async with recording_of(address, "accumulator", limit_bytes=3000) as (recorder, recording, _):
        old = await recorder.create("accumulator")
        recorder.get(recording.session.session_id)
        recording.set_sequence(sequence(200))
        ids = {recording.recording_id}
        while await recorder.advance(recording, 20):
            ids.add(recording.recording_id)

        assert recorder.find(old.session.session_id) is None
        assert len(ids) > 1
        assert recording.first_step > 0
        assert recording.first_step + recording.num_steps == recording.session.next_step == 200
        await is_exact(recorder, recording)


async def test_what_makes_no_sense_is_refused(
    start_server: Callable[..., ServerProcess], models: Path
) -> None:
    async with recording_of(start_server(models).address, "accumulator") as (recorder, recording, _):
        with pytest.raises(BadRequestError, match="no sequence"):
            await recorder.advance(recording, 1)
        with pytest.raises(NotFoundError, match="not recorded"):
            await recorder.fork(recording, 1)
        with pytest.raises(NotFoundError, match="no state"):
            await recorder.edit(recording, 0, "nothing", (0,), 1.0)
        with pytest.raises(NotFoundError, match="no element"):
            await recorder.edit(recording, 0, "sum", (3,), 1.0)
        with pytest.raises(NotFoundError, match="not open"):
            recorder.get("nobody")
        await asyncio.sleep(0)
