"""Records: what a run leaves behind for people and plots.

One line of JSON an update in `metrics.jsonl`, and the same numbers for TensorBoard. `checkpoint.py` keeps what
the run itself needs. A number that is not finite stands there as null, since JSON has no other word for it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class Records:
    """The open record files of a run.

    Args:
        run_dir: the run's folder.
        after_update: where the run goes on; what was recorded later, by a process that died before its next
            checkpoint, is dropped, so that every update stands there once.
    """

    def __init__(self, run_dir: Path, after_update: int) -> None:
        path = run_dir / METRICS
        self.num_damaged = _drop_after(path, after_update)
        """Lines that could not be read and were left out."""
        self._lines = path.open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_update + 1)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._tensorboard.close()

    def sync(self) -> None:
        """Bring what was recorded to the disk, so that a checkpoint never stands there without it."""
        os.fsync(self._lines.fileno())

    def add(self, update: int, values: dict[str, float]) -> None:
        """Record the numbers of one update."""
        self._lines.write(as_json({"update": update, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._tensorboard.add_scalar(name, value, update)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a run, and how many lines of the file are none: torn by a kill, or damaged later on."""
    records, num_damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if not isinstance(record["update"], int) or not all(map(_is_number, record.values())):
                raise ValueError(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            num_damaged += 1
        else:
            records.append(record)
    return records, num_damaged


def as_json(value: Any, indent: int | None = None) -> str:
    """As JSON, with null for a number that is not finite."""
    return json.dumps(_without_non_finite(value), indent=indent, allow_nan=False)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: object) -> bool:
    """Or null, which stands for one that is not finite."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _drop_after(path: Path, update: int) -> int:
    """Keep the records up to an update, and none twice; returns how many lines before were damaged."""
    if not path.exists():
        return 0
    records, num_damaged = read_records(path)
    kept = {record["update"]: record for record in records if record["update"] <= update}
    beside = path.with_suffix(".tmp")
    with beside.open("w") as file:
        file.writelines(as_json(record) + "\n" for record in kept.values())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return num_damaged
