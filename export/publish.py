"""Publishing: write, verify, and only then let the version appear, by one rename.

Everything happens in a hidden folder beside the target; whatever goes wrong, nothing else is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from export.errors import TargetError
from export.onnx_file import write_onnx
from export.spec import model_spec
from export.step import Step
from export.verification import Report, verify
from training.checkpoint import BEST, Checkpoint, load, restore_cell

MODEL_FILE = "model.onnx"


def publish(run_dir: Path, target: Path, memory_rows: int | None = None) -> tuple[Checkpoint, Report]:
    """Export a run's best checkpoint as a model version; returns both with what was verified.

    Args:
        run_dir: a training run.
        target: `<models>/<name>/<version>`, which must not exist.
        memory_rows: of the exported memory; as many as in training if not given.

    Raises:
        TargetError: the target is not a version directory, or exists.
        training.errors.CheckpointError: the run has no whole checkpoint.
        training.errors.SettingsError: the model cannot work with so many rows.
        VerificationError: the file does not do what the cell does.
    """
    name = _check_target(target)
    checkpoint = load(run_dir / BEST)
    cell, settings = restore_cell(checkpoint, memory_rows)
    step = Step(cell.eval(), settings.task.loss)
    spec = model_spec(name, step, checkpoint, settings)
    missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise TargetError(
            f"{target.parent} cannot be a folder, a file is in the way: choose another"
        ) from None
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_onnx(step, spec, draft / MODEL_FILE)
        report = verify(draft / MODEL_FILE, step, settings.task, settings.long_sizes)
        draft.chmod(0o755)
        _move(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # Another export may have put its version there.
                folder.rmdir()
        raise
    return checkpoint, report


def _check_target(target: Path) -> str:
    """The model's name, from the path."""
    name, version = target.absolute().parent.name, target.name
    if not re.fullmatch(r"[1-9][0-9]{0,17}", version):
        raise TargetError(f"{target} does not end in a version number: give <models>/<name>/<version>")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", name):
        raise TargetError(f"{name!r} cannot be a model's name: use letters, digits, '_', '-' and '.'")
    if target.exists():
        raise TargetError(f"{target} exists and versions are never overwritten: choose the next number")
    return name


def _move(draft: Path, target: Path) -> None:
    for path in (draft / MODEL_FILE, draft):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        draft.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise TargetError(f"{target} appeared while it was exported: choose the next number") from None
