"""`python -m benchmarks.commits`: how long one commit of a SQLite store takes with `--sync normal`, by itself."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

from server.storage.interface import FIRST_FENCE, NEW, Entry, Record, Write
from server.storage.sqlite import SqliteStore

_NUM_COMMITS = 1000
_RECORD_BYTES = 2200
_SESSIONS = [f"s{number}" for number in range(64)]


def main() -> None:
    """Print the median and the mean of commits of 64 records, and of one."""
    with tempfile.TemporaryDirectory(prefix="ntm-store-") as directory:
        store = SqliteStore(Path(directory) / "sessions.sqlite3", "normal")
        entries = [Entry(name, "copy", "", 0, 0.0, b"entry") for name in _SESSIONS]
        store.commit([Write(entry.session_id, NEW, 0, 0.0, entry=entry) for entry in entries])
        content, step = os.urandom(_RECORD_BYTES), 0
        for names in (_SESSIONS, _SESSIONS[:1]):
            times_s = []
            for _ in range(_NUM_COMMITS):
                record = Record(step, content)
                step += 1
                writes = [Write(name, FIRST_FENCE, step, float(step), record=record) for name in names]
                start_s = time.perf_counter()
                store.commit(writes)
                times_s.append(time.perf_counter() - start_s)
            median_us, mean_us = (1e6 * f(times_s) for f in (statistics.median, statistics.mean))
            print(f"{len(names):2} records: median {median_us:.0f} µs, mean {mean_us:.0f} µs")
        store.close()


if __name__ == "__main__":
    main()
