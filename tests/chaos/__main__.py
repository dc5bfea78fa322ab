"""`python -m tests.chaos`: 200 kills on each durable store, then many random histories; 20 minutes at most."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.kills import Tally, kill_again_and_again, table
from tests.conftest import ROOT
from tests.valkey import ValkeyServer

_MOST_MINUTES = 20.0
_SHARE_OF_KILLS = 0.42
"""Of the time, on each store; the rest is for random histories."""


def main() -> int:
    """Returns the exit status: 0 if nothing was lost, doubled or different."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="on each store (200)")
    parser.add_argument("--minutes", type=float, default=_MOST_MINUTES, help="for everything (20)")
    parser.add_argument("--stores", nargs="*", default=["sqlite", "redis"], choices=["sqlite", "redis"])
    parser.add_argument("--no-histories", action="store_true", help="kill only")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    options = parser.parse_args()
    ends_s = time.monotonic() + 60 * options.minutes
    print(f"seed {options.seed}, {os.cpu_count()} CPUs", flush=True)

    tallies: list[Tally] = []
    for name in options.stores:
        with tempfile.TemporaryDirectory() as directory, _new_store(name, Path(directory)) as url:
            limit_s = 60 * options.minutes * _SHARE_OF_KILLS
            tallies.append(
                kill_again_and_again(url, name, Path(directory), options.kills, options.seed, limit_s)
            )
        print(table(tallies[-1:]), flush=True)
    print(f"\n{table(tallies)}\n", flush=True)
    if not all(tally.is_clean for tally in tallies):
        return 1
    if options.no_histories:
        return 0
    histories = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "--hypothesis-profile=chaos"]
    histories += [f"--hypothesis-seed={options.seed}", "tests/reliability/test_random_histories.py"]
    trying = subprocess.Popen(histories, cwd=ROOT)
    try:
        return trying.wait(ends_s - time.monotonic())
    except subprocess.TimeoutExpired:
        trying.send_signal(signal.SIGINT)  # so that it ends what it has started
        trying.wait()
        print("the time is over; no history that was tried has failed")
        return 0


@contextmanager
def _new_store(name: str, directory: Path) -> Iterator[str]:
    if name == "sqlite":
        yield f"sqlite:///{directory}/sessions.sqlite3"
        return
    server = ValkeyServer(directory / "valkey", appendfsync="always")
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
