"""Records: what a run leaves behind for people and plots.

One line of JSON an update in `metrics.jsonl`, and the same numbers for TensorBoard. `checkpoint.py` keeps what
the run itself needs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType

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
        _drop_after(path, after_update)
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
        self._lines.write(json.dumps({"update": update, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, update)


def _drop_after(path: Path, update: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["update"] > update:
                break
        except json.JSONDecodeError:
            break  # The process died while it wrote this line.
        kept.append(line + "\n")
    beside = path.with_suffix(".tmp")
    with beside.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
