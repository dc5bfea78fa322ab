"""`python -m tests.fuzz`: a million inputs, nearly right ones, for everything that reads what somebody else wrote.

Fails if any decoder raises what it does not declare, takes over a second, or allocates out of proportion (`running.py`
says how that is measured). Model files are slow, and have a smaller share; the table says how many inputs each had.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time

from tests.fuzz.running import Tally, try_all, try_in_processes, try_input


def table(tallies: dict[str, Tally]) -> str:
    """The tallies as a table in Markdown."""
    rows = [
        ["Decoder", "Inputs", "Accepted", "Refused", "Faults", "Slowest ms", "Largest allocation / input"]
    ]
    rows.append(["---"] * 7)
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    for name, tally in [*tallies.items(), ("All", total)]:
        counts = [tally.inputs, tally.accepted, tally.refused, len(tally.faults)]
        rows.append([name, *map(str, counts), f"{tally.slowest_ms:.1f}", f"{tally.largest_ratio:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


async def try_one(seed: int, name: str, number: int) -> dict[str, Tally]:
    """One input again, with the traceback of what it raises."""
    import tempfile
    from pathlib import Path

    from tests.fuzz.decoders import all_decoders

    with tempfile.TemporaryDirectory(prefix="ntm-fuzz-") as directory:
        async with all_decoders(Path(directory)) as decoders:
            [decoder] = [each for each in decoders if each.name == name]
            tally = Tally()
            await try_input(decoder, seed, number, tally, is_traced=False)
            return {name: tally}


def main() -> int:
    """Returns the exit status: 0 if every input was received as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--num-inputs", type=int, default=1_000_000, help="of all decoders together (1000000)"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--minutes", type=float, default=15.0, help="the most that it takes (15)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--decoder", help="one alone, by its name")
    parser.add_argument("--input", type=int, help="one input of it alone, by its number")
    options = parser.parse_args()
    begin_s = time.monotonic()
    ends_s = begin_s + 60 * options.minutes
    print(f"seed {options.seed}, {options.processes} processes", flush=True)
    if options.decoder and options.input is not None:
        tallies = asyncio.run(try_one(options.seed, options.decoder, options.input))
    elif options.decoder:
        tallies = asyncio.run(
            try_all(options.seed, options.num_inputs, ends_s=ends_s, only=[options.decoder])
        )
    else:
        tallies = try_in_processes(options.seed, options.num_inputs, options.processes, ends_s)
    print(table(tallies))
    num_inputs = sum(tally.inputs for tally in tallies.values())
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    for fault in faults:
        print(fault)
    print(
        f"{num_inputs} inputs in {time.monotonic() - begin_s:.0f} s, {len(faults)} not received as they should be"
    )
    if time.monotonic() > ends_s:
        print(f"the time was over before all {options.num_inputs} were tried")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
