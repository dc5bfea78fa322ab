"""Everything that reads what somebody else wrote refuses what is wrong in words; `make fuzz` tries a million inputs."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import running
from tests.fuzz.decoders import Decoder
from tests.fuzz.running import Tally, try_all, try_input

NUM_INPUTS = 5000


def reader(decode: object) -> Decoder:
    return Decoder("reader", 1, lambda chance: chance.randbytes(100), decode, (KeyError,))  # type: ignore[arg-type]


async def test_no_decoder_crashes_hangs_or_takes_memory_out_of_proportion() -> None:
    tallies = await try_all(seed=0, num_inputs=NUM_INPUTS)

    assert [fault for tally in tallies.values() for fault in tally.faults] == []
    assert sum(tally.inputs for tally in tallies.values()) > 0.9 * NUM_INPUTS
    assert [name for name, tally in tallies.items() if not tally.inputs] == []
    assert sum(tally.accepted for tally in tallies.values()) > 0.1 * NUM_INPUTS


async def test_an_exception_that_is_not_declared_is_a_fault_and_one_that_is_declared_is_a_refusal() -> None:
    def crash(data: bytes) -> None:
        raise ValueError(data[:1])

    def refuse(data: bytes) -> None:
        raise KeyError(data[:1])

    for decode, num_faults in ((crash, 1), (refuse, 0)):
        tally = Tally()
        await try_input(reader(decode), 0, 0, tally, is_traced=False)
        assert (len(tally.faults), tally.refused) == (num_faults, 1 - num_faults)


async def test_too_much_memory_and_too_much_time_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SLOWEST_S", 0.01)

    def allocate(data: bytes) -> None:
        bytes(10_000_000)

    def work(data: bytes) -> None:
        random.Random(0).randbytes(20_000_000)

    for decode, said in ((allocate, "bytes allocated for 100"), (work, "it took")):
        tally = Tally()
        await try_input(reader(decode), 0, 0, tally, is_traced=decode is allocate)
        [fault] = tally.faults
        assert said in fault


async def test_an_input_is_made_anew_from_its_name() -> None:
    read: list[bytes] = []
    for _ in range(2):
        await try_input(reader(read.append), 7, 3, Tally(), is_traced=False)

    assert read[0] == read[1]
