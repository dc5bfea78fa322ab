"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

A checkpoint is written beside its place, flushed to the disk and renamed over the last one, so at any moment,
also after a power cut, the file under its name is whole. `loop.py` decides when; `export` reads them.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from training.config import Settings, make_cell, settings_class
from training.errors import CheckpointError, SettingsError
from training.model import Cell, NTMCell, with_memory_rows

LAST = "last.pt"
BEST = "best.pt"
_FORMAT = 2


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


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Put a checkpoint in place by one rename.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; the last one is still there.
    """
    beside = path.with_suffix(".tmp")
    try:
        with beside.open("wb") as file:
            torch.save({"format": _FORMAT, **checkpoint._asdict()}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # What torch makes of a failed write is a RuntimeError.
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error}): the one before is still there; make room and --resume"
        ) from None
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, tensors and plain values only, never code.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise CheckpointError(f"{path} may not be read by you: change its permissions") from None
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path.parent} has no checkpoint {path.name}: train there first") from None
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ):
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint: use another, or train again"
        ) from None
    expected = {"format", *Checkpoint._fields}
    if not isinstance(content, dict) or content.keys() != expected or content.pop("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version: train again")
    return Checkpoint(**content)


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
    if not isinstance(cell, NTMCell):
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
