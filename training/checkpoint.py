"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

A checkpoint is written beside its place, flushed to the disk and renamed over the last one, so at any moment,
also after a power cut, the file under its name is whole. Its last line is the SHA-256 of what stands before it: a bit
that flips later on is found when the file is read, which torch alone would not. `loop.py` decides when; `export` reads
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
import pickle
import platform
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from training.config import Settings, make_cell, settings_class
from training.errors import CheckpointError, NonFiniteError, SettingsError
from training.model import Cell, PlainCell, with_memory_rows

LAST = "last.pt"
BEST = "best.pt"
_FORMAT = 3
_DIGEST = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_DIGEST_BYTES = 73
# What the bits of a run depend on beside its settings.
_LIBRARIES = ("torch", "numpy", "numba", "lightning-fabric")


class Checkpoint(NamedTuple):
    """A run at the end of an update."""

    settings: dict[str, Any]
    """The resolved settings, as JSON would hold them."""
    command: str
    """What was typed to start the run."""
    update: int
    """Updates done."""
    seconds: float
    """Wall-clock time that those took."""
    cpu_seconds: float
    """Processor time of the first process that those took, compilation included."""
    cell: dict[str, Any]
    """Weights, and the tensors of the initial state."""
    averaged: dict[str, Any]
    """Their running mean, which is evaluated and exported; the same where none is kept."""
    optimizer: dict[str, Any]
    """Running means and momenta."""
    random_state: torch.Tensor
    """Of torch's own generator."""
    sequences_state: torch.Tensor
    """Of the generator that draws the sequences."""
    metrics: dict[str, float]
    """The scores of the last evaluation up to here, by name."""
    best_score: float
    """The least score of any evaluation up to here; see `evaluate.py`."""
    solved: dict[str, float]
    """The first evaluation at which the task was solved: `update`, `seconds` and `cpu_seconds`. Empty before."""
    learning_rate: float
    """The step size, before warm-up and schedule."""
    num_sizes: int
    """Sizes of training that are open, the smallest ones."""
    attempt_began: int
    """The update after which the weights were last begun with."""
    num_averaged: int
    """Updates in the running mean; it begins anew with the weights."""
    num_diverged: int
    """Attempts that were given up because a loss or gradient was not finite."""
    num_skipped: int
    """Updates that were left out for the same reason."""
    num_skipped_in_a_row: int
    """Of those, the last ones."""
    versions: dict[str, str]
    """Of Python and of the libraries that the run was made with."""


def versions() -> dict[str, str]:
    """Of Python and of the libraries on which the bits of a run depend, as they are installed."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **libraries}


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Put a checkpoint in place by one rename.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; the last one is still there.
        NonFiniteError: the weights are not finite numbers; the last one is still there.
    """
    if not is_finite(checkpoint.cell) or not is_finite(checkpoint.averaged):
        raise NonFiniteError(
            f"the weights are no longer finite numbers and {path} is not written: what was there is kept"
        )
    content = io.BytesIO()
    torch.save({"format": _FORMAT, **checkpoint._asdict()}, content)
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    had_one = path.exists()
    beside = path.with_suffix(".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content.getbuffer())
            file.write(f"\nsha256 {digest}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        what_now = (
            "the one before is still there; make room and --resume"
            if had_one
            else "there was none before; make room and start the run again"
        )
        raise CheckpointError(f"{path} cannot be written ({error}): {what_now}") from None


def is_finite(weights: dict[str, Any]) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(weight.isfinite().all()) for weight in weights.values())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, tensors and plain values only, never code.

    Raises:
        CheckpointError: there is none, or it is not, to the bit, what was saved.
    """
    try:
        data = path.read_bytes()
    except PermissionError:
        raise CheckpointError(f"{path} may not be read by you: change its permissions") from None
    except (FileNotFoundError, NotADirectoryError):
        if (path.parent / "model.onnx").exists():
            raise CheckpointError(
                f"{path.parent} is a model and not a run: `python -m export restore {path.parent} RUN` makes a run of "
                "it"
            ) from None
        raise CheckpointError(f"{path.parent} has no checkpoint {path.name}: train there first") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use another, or train again") from None
    content, digest = data[:-_DIGEST_BYTES], _DIGEST.fullmatch(data[-_DIGEST_BYTES:])
    if digest is None:
        raise CheckpointError(
            f"{path} is truncated, or not a checkpoint of this version: use another, or train again"
        )
    if hashlib.sha256(content).hexdigest().encode() != digest[1]:
        raise CheckpointError(f"{path} is damaged: use another, or train again")
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ):
        raise CheckpointError(f"{path} is not a checkpoint: use another, or train again") from None
    expected = {"format", *Checkpoint._fields}
    if not isinstance(values, dict) or values.keys() != expected or values.pop("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version: train again")
    return Checkpoint(**values)


def restore_cell(checkpoint: Checkpoint, memory_rows: int | None = None) -> tuple[Cell, Settings]:
    """The trained cell, averaged where the run keeps an average, and the settings it was trained with.

    Args:
        checkpoint: of the run.
        memory_rows: of the cell's memory; as many as it was trained with if not given.

    Raises:
        CheckpointError: the weights do not fit the settings.
        SettingsError: the cell cannot work with so many rows.
    """
    settings = restore_settings(checkpoint)
    cell = make_cell(settings)
    load_weights(cell, checkpoint.averaged)
    if memory_rows is None:
        return cell, settings
    if isinstance(cell, PlainCell):
        raise SettingsError("--memory-rows: this model is a plain network, without a memory: leave it out")
    try:
        return with_memory_rows(cell, memory_rows), settings
    except ValueError as error:
        raise SettingsError(f"--memory-rows {memory_rows}: {error}") from None


def restore_settings(checkpoint: Checkpoint) -> Settings:
    """The settings of the run.

    Raises:
        CheckpointError: they are not of this version.
    """
    try:
        return settings_class(checkpoint.settings["task"]["name"])(**checkpoint.settings)
    except (ValidationError, SettingsError, KeyError, TypeError):
        raise CheckpointError("the checkpoint's settings are not of this version: train again") from None


def load_weights(cell: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Put a checkpoint's weights into a cell.

    Raises:
        CheckpointError: they are of a cell of another architecture.
    """
    try:
        cell.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise CheckpointError(f"the checkpoint's weights are of another model: {reason}") from None
