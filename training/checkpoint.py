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

from training.config import Settings, make_cell
from training.errors import CheckpointError
from training.model import NTMCell

LAST = "last.pt"
BEST = "best.pt"
_FORMAT = 1


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
    cell: dict[str, Any]
    """Weights, and the tensors of the initial state."""
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
    """The first evaluation at which the task was solved: `update` and `seconds`. Empty before."""


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Put a checkpoint in place by one rename."""
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save({"format": _FORMAT, **checkpoint._asdict()}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
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


def restore_cell(checkpoint: Checkpoint) -> tuple[NTMCell, Settings]:
    """The trained cell and the settings it was trained with.

    Raises:
        CheckpointError: the weights do not fit the settings.
    """
    try:
        settings = Settings(**checkpoint.settings)
        cell = make_cell(settings)
        cell.load_state_dict(checkpoint.cell)
    except ValidationError:
        raise CheckpointError("the checkpoint's settings are not of this version: train again") from None
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are of another model: {error}") from None
    return cell, settings
