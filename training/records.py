"""Records: what a run leaves behind for people and plots.

One line of JSON an update in `metrics.jsonl`, and the same numbers for TensorBoard and for `loggers.py`.
`checkpoint.py` keeps what the run itself needs. A number that is not finite stands there as null, since JSON has no
other word for it. A line's last entry is the CRC-32 of what stands before it, so that one whose digits have changed is
known.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_fabric.loggers.logger import Logger
from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
_LINE = re.compile(rb'(\{.*), "crc32": ([0-9]{1,10})\}')


class Records:
    """The open record files of a run.

    Args:
        run_dir: the run's folder.
        after_update: where the run goes on; what was recorded later, by a process that died before its next
            checkpoint, is dropped, so that every update stands there once.
        loggers: which are told the same, and that the run has ended.
    """

    def __init__(self, run_dir: Path, after_update: int, loggers: Sequence[Logger] = ()) -> None:
        path = run_dir / METRICS
        self.num_missing = _drop_after(path, after_update)
        """Updates up to there of which there is no record, or one that was damaged and left out."""
        self._lines = path.open("a")
        self._loggers = loggers
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_update + 1)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._tensorboard.close()
        for logger in self._loggers:
            logger.finalize("success" if kind is None else "failed")

    def sync(self) -> None:
        """Bring what was recorded to the disk, so that a checkpoint never stands there without it."""
        os.fsync(self._lines.fileno())

    def add(self, update: int, values: dict[str, float]) -> None:
        """Record the numbers of one update."""
        self._lines.write(as_line({"update": update, **values}))
        self._lines.flush()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, update)
        for logger in self._loggers:
            logger.log_metrics(finite, step=update)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run, by update. A line that is torn or damaged is none."""
    records = {}
    for line in path.read_bytes().splitlines():
        parts = _LINE.fullmatch(line)
        if parts is not None and zlib.crc32(parts[1]) == int(parts[2]):
            record = json.loads(parts[1] + b"}")
            records[record["update"]] = record
    return [records[update] for update in sorted(records)]


def num_missing(records: list[dict[str, Any]], up_to: int) -> int:
    """Of how many of the updates up to one there is no record."""
    return up_to - len([record for record in records if record["update"] <= up_to])


def as_line(record: dict[str, Any]) -> str:
    """The line of a record, which has an `update`."""
    text = as_json(record)[:-1]
    return f'{text}, "crc32": {zlib.crc32(text.encode())}}}\n'


def as_json(value: Any, indent: int | None = None) -> str:
    """As JSON, with null for a number that is not finite."""
    return json.dumps(_without_non_finite(value), indent=indent, allow_nan=False)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, update: int) -> int:
    """Keep the records up to an update; returns of how many there is none."""
    if not path.exists():
        return update
    kept = [record for record in read_records(path) if record["update"] <= update]
    beside = path.with_suffix(".tmp")
    with beside.open("w") as file:
        file.writelines(map(as_line, kept))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return num_missing(kept, update)
