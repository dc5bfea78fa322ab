"""Attacks by whoever may write to the models directory: files that are no models, or do not end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

from tests import step_models


def bad_models(_address: str, stop: Event) -> None:
    """A FIFO, a link to an endless file, a link to itself, garbage, and a model that does not return at once."""
    root = Path(os.environ["ATTACKED_MODELS"])
    while not stop.is_set():
        for name, make in _FILES.items():
            directory = root / name / "1"
            directory.mkdir(parents=True)
            make(directory / "model.onnx")
        stop.wait(1.0)
        for name in _FILES:
            shutil.rmtree(root / name)


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(2**20))


def _cut(path: Path) -> None:
    path.write_bytes(step_models.accumulator()[:-40])


_FILES: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "itself": lambda path: path.symlink_to(path),
    "garbage": _garbage,
    "cut": _cut,
}
