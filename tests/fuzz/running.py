"""Running: inputs in turn through decoders, and what is wrong with how one is received.

An input is named by the seed, its decoder and its number, and made anew from these. It is at fault if the decoder

- raises anything but what it says that it raises, or ends the process;
- takes more than a second of the thread's own time (others use the machine as well), or never returns;
- allocates more than ten times the input's bytes and `SPARE_BYTES`, at its peak. Python and numpy tell tracemalloc what
  they allocate; this is looked at for one input in `TRACED_EVERY`, as it takes several times as long. What C libraries
  allocate by themselves (protobuf, ONNX, cryptography) is bounded for the whole process, by RLIMIT_AS, at
  `MOST_PROCESS_BYTES` over what it has when it begins: beyond that they fail, and are at fault by the first rule.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import random
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from tests.fuzz.decoders import Decoder, Reached, all_decoders, awaited

TRACED_EVERY = 20
SPARE_BYTES = 128 * 1024
MOST_RATIO = 10
SLOWEST_S = 1.0
MOST_PROCESS_BYTES = 2 * 2**30
SILENT_FOR_S = 60.0
"""A process that finishes no input for as long hangs."""
_MOST_FAULTS = 5
"""Of one decoder in one process: it is left alone then."""


@dataclass
class Tally:
    """What became of a decoder's inputs."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_ms: float = 0.0
    largest_ratio: float = 0.0
    """Of bytes allocated beyond `SPARE_BYTES` to the input's."""
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in what another process found."""
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.slowest_ms = max(self.slowest_ms, other.slowest_ms)
        self.largest_ratio = max(self.largest_ratio, other.largest_ratio)
        self.faults += other.faults


async def try_input(decoder: Decoder, seed: int, number: int, tally: Tally, is_traced: bool) -> None:
    """Make an input, let the decoder read it, and note what is wrong."""
    data = decoder.make(random.Random(f"{seed} {decoder.name} {number}"))
    tally.inputs += 1
    problem = ""
    if is_traced:
        tracemalloc.start()
    start_s = time.thread_time()
    try:
        await awaited(decoder.decode(data))
        tally.accepted += 1
    except Reached:
        tally.accepted += 1
    except decoder.refusals:
        tally.refused += 1
    except Exception as error:  # what this is here to find
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    took_s = time.thread_time() - start_s
    if is_traced:
        num_bytes = max(0, tracemalloc.get_traced_memory()[1] - SPARE_BYTES)
        tracemalloc.stop()
        ratio = num_bytes / max(1, len(data))
        tally.largest_ratio = max(tally.largest_ratio, ratio)
        if ratio > MOST_RATIO:
            problem = problem or f"{num_bytes + SPARE_BYTES} bytes allocated for {len(data)}"
    else:
        tally.slowest_ms = max(tally.slowest_ms, 1e3 * took_s)
    if took_s > SLOWEST_S:
        problem = problem or f"it took {took_s:.1f} s"
    if problem:
        where = f"--seed {seed} --decoder {decoder.name!r} --input {number}"
        tally.faults.append(f"{decoder.name}: {problem}\n    {data[:160]!r}\n    again: {where}")


async def try_all(
    seed: int,
    num_inputs: int,
    part: tuple[int, int] = (0, 1),
    ends_s: float = float("inf"),
    progress: Any = None,
    only: Sequence[str] = (),
) -> dict[str, Tally]:
    """Try inputs of all decoders, by their shares; of `part` (i, n) every n-th, from the i-th on.

    Args:
        seed: of all that is drawn.
        num_inputs: of all decoders and parts together.
        part: which of them.
        ends_s: when to end, by the monotonic clock, whatever is left.
        progress: told which input is tried, if it is there.
        only: names of decoders; all if empty.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory(prefix="ntm-fuzz-") as directory:
        async with all_decoders(Path(directory)) as decoders:
            decoders = [each for each in decoders if not only or each.name in only]
            tallies = {each.name: Tally() for each in decoders}
            counts = counts_of(decoders, num_inputs)
            # In rounds, so that where the time ends early all are tried as far.
            num_rounds = 50
            for turn in range(num_rounds):
                for decoder in decoders:
                    count, tally = counts[decoder.name], tallies[decoder.name]
                    numbers = range(count * turn // num_rounds, count * (turn + 1) // num_rounds)
                    for number in numbers:
                        if number % part[1] != part[0] or len(tally.faults) >= _MOST_FAULTS:
                            continue
                        if time.monotonic() > ends_s:
                            return tallies
                        if progress is not None:
                            progress.value = f"--decoder {decoder.name!r} --input {number}".encode()
                        is_traced = number // part[1] % TRACED_EVERY == 0
                        await try_input(decoder, seed, number, tally, is_traced)
            return tallies


def counts_of(decoders: Sequence[Decoder], num_inputs: int) -> dict[str, int]:
    """How many inputs each gets."""
    total = sum(each.share for each in decoders)
    return {each.name: max(1, round(num_inputs * each.share / total)) for each in decoders}


def try_in_processes(seed: int, num_inputs: int, num_processes: int, ends_s: float) -> dict[str, Tally]:
    """As `try_all`, each part in a process, which may die or hang of it."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Tally] = {}
    workers = []
    for index in range(num_processes):
        progress, (receiver, sender) = context.Array("c", 100), context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(sender, seed, num_inputs, (index, num_processes), ends_s, progress)
        )
        process.start()
        sender.close()
        workers.append((process, progress, receiver))
    for process, progress, receiver in workers:
        problem = ""
        last, since_s = b"", time.monotonic()
        while not receiver.poll(1.0):
            if (now := progress.value) != last:
                last, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > SILENT_FOR_S:
                problem = "it hangs"
                process.kill()
                break
        if not problem:
            try:
                for name, tally in receiver.recv().items():
                    found.setdefault(name, Tally()).add(tally)
            except EOFError:
                process.join()
                problem = f"the process ended with {process.exitcode}"
        process.join()
        if problem:
            fault = f"{problem}\n    again: --seed {seed} {progress.value.decode()}"
            found.setdefault("(the process)", Tally()).faults.append(fault)
    return found


def _work(
    sender: Any, seed: int, num_inputs: int, part: tuple[int, int], ends_s: float, progress: Any
) -> None:
    has_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # The server that is asked has not been built yet: its engines' threads reserve some 2 GiB of addresses.
    most = has_bytes + MOST_PROCESS_BYTES + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sender.send(asyncio.run(try_all(seed, num_inputs, part, ends_s, progress)))
