"""`python -m tests.training.fuzz`: 2,000 damaged checkpoints and records, none of which may be taken for whole.

A small run is made; a file of it is damaged as disks, transfers and kills damage files; then what reads it must refuse
it, or leave out and count what is damaged, in words and never in a traceback. Every so often the commands themselves
are given such a run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from tests.training.conftest import TINY
from training import checkpoint
from training.__main__ import main as training
from training.checkpoint import BEST, LAST
from training.errors import CheckpointError
from training.records import METRICS, Records, read_records

_COMMANDS_EVERY = 40


def flip_a_bit(data: bytes, chance: random.Random) -> bytes:
    """One bit of one byte."""
    damaged, place = bytearray(data), chance.randrange(len(data))
    damaged[place] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def zero_a_block(data: bytes, chance: random.Random) -> bytes:
    """A sector or a page that never reached the disk."""
    size = chance.choice([16, 512, 4096])
    start = chance.randrange(len(data)) // size * size
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def truncate(data: bytes, chance: random.Random) -> bytes:
    """The end is missing."""
    return data[: chance.randrange(len(data))]


def lose_a_part(data: bytes, chance: random.Random) -> bytes:
    """Something in the middle is missing."""
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 5000) :]


def repeat_a_part(data: bytes, chance: random.Random) -> bytes:
    """Something in the middle stands there twice."""
    start = chance.randrange(len(data))
    end = start + chance.randrange(1, 5000)
    return data[:end] + data[start:end] + data[end:]


def scribble(data: bytes, chance: random.Random) -> bytes:
    """Random bytes, no UTF-8 among them, over a part, or behind the end."""
    start = chance.choice([chance.randrange(len(data)), len(data)])
    size = chance.randrange(1, 300)
    return data[:start] + chance.randbytes(size) + data[start + size :]


def change_a_digit(data: bytes, chance: random.Random) -> bytes:
    """Still well formed, and wrong."""
    places = [place for place, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    damaged = bytearray(data)
    damaged[chance.choice(places)] = chance.randrange(0x30, 0x3A)
    return bytes(damaged)


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    flip_a_bit,
    zero_a_block,
    truncate,
    lose_a_part,
    repeat_a_part,
    scribble,
    change_a_digit,
]


def check_checkpoint(path: Path) -> str | None:
    """What is wrong with how a damaged checkpoint was received; None if it was refused."""
    try:
        checkpoint.load(path)
    except CheckpointError:
        return None
    return "loaded without a word"


def check_records(run_dir: Path, whole: list[dict[str, float]]) -> str | None:
    """What is wrong with how damaged records were received."""
    read = read_records(run_dir / METRICS)
    if any(record not in whole for record in read):
        return "a record that was never written"
    last = whole[-1]["update"]
    with Records(run_dir, after_update=int(last)) as records:
        missing = records.num_missing
    if missing != len(whole) - len(read):
        return f"{missing} updates said to be missing, not {len(whole) - len(read)}"
    lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    return None if len(lines) == len(read) else "what is damaged was kept"


def check_commands(run_dir: Path, is_checkpoint: bool) -> str | None:
    """What is wrong with what the commands make of a damaged run."""
    commands = [
        ["copy", f"--run-dir={run_dir}", "--resume", "--num-updates=14"],
        ["plot", str(run_dir)],
        ["evaluate", str(run_dir), "--num-sequences=2", "--patterns=none"],
    ]
    codes = []
    for command in commands:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            codes.append(training(command))
        if "Traceback" in said.getvalue():
            return f"a traceback of {command[0]}"
    if is_checkpoint and 1 not in codes:
        return "no command refused it"
    return None


def main() -> int:
    """Returns the exit status: 0 if nothing was taken for whole and nothing ended in a traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.training.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=2000, help="damaged files (2000)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, console = random.Random(options.seed), Console(highlight=False)
    console.print(f"seed {options.seed}")
    os.environ["COLUMNS"] = "200"
    tried: Counter[tuple[str, str]] = Counter()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        made, run_dir = Path(folder) / "made", Path(folder) / "run"
        with contextlib.redirect_stderr(io.StringIO()):
            assert training(["copy", *TINY, f"--run-dir={made}"]) == 0
        shutil.rmtree(made / "tensorboard")
        whole = read_records(made / METRICS)
        while sum(tried.values()) < options.files:
            name, damage = chance.choice([LAST, BEST, METRICS]), chance.choice(DAMAGES)
            before = (made / name).read_bytes()
            data = damage(before, chance)
            if data == before:
                continue
            with_commands = sum(tried.values()) % _COMMANDS_EVERY == 0
            tried[name, damage.__name__] += 1
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(made, run_dir)
            (run_dir / name).write_bytes(data)
            try:
                problem = None
                if with_commands:
                    problem = check_commands(run_dir, name != METRICS)
                    (run_dir / name).write_bytes(data)
                if problem is None and name == METRICS:
                    problem = check_records(run_dir, whole)
                elif problem is None:
                    problem = check_checkpoint(run_dir / name)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is not None:
                problems.append(problem)
                console.print(f"{name}, {damage.__name__}: {problem}", markup=False)
    for (name, damage_name), number in sorted(tried.items()):
        console.print(f"{name:14} {damage_name:16} {number}")
    console.print(
        f"{sum(tried.values())} damaged files, {len(problems)} of them not received as they should be"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
