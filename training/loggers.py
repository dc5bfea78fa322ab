"""Loggers: other places than the run directory for a run's records, by Lightning Fabric's interface.

Weights & Biases by its name, and any other by an import path: `module:name` of a `lightning_fabric` Logger, or of a
function or class that is called with the run directory and makes one. They are given what `records.py` records.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger

from training.config import Settings
from training.errors import SettingsError
from training.import_path import find

_WANDB = "wandb"
_RUN_ID = "wandb_id"


def make_loggers(settings: Settings) -> list[Logger]:
    """The loggers that a run's settings name, told the settings.

    Raises:
        SettingsError: there is no such logger, or its package is not installed.
    """
    loggers = [
        _wandb(settings.run_dir) if name == _WANDB else _found(name, settings.run_dir)
        for name in settings.loggers
    ]
    for logger in loggers:
        logger.log_hyperparams(settings.model_dump(mode="json"))
    return loggers


def _found(path: str, run_dir: Path) -> Logger:
    if ":" not in path:
        raise SettingsError(f"loggers: {path!r} is neither wandb nor an import path module:name")
    found: Any = find(path, "loggers")
    if callable(found) and not isinstance(found, Logger):
        found = found(run_dir)
    if not isinstance(found, Logger):
        raise SettingsError(f"loggers: {path!r} is no Logger of lightning_fabric, nor makes one")
    return found


def _wandb(run_dir: Path) -> Logger:
    """A run of Weights & Biases that goes on where this one is resumed; its project is `ntm`, or WANDB_PROJECT."""
    try:
        from pytorch_lightning.loggers import WandbLogger

        logger: Logger = WandbLogger(
            project=os.environ.get("WANDB_PROJECT", "ntm"),
            name=run_dir.name,
            id=_run_id(run_dir),
            resume="allow",
            save_dir=str(run_dir),
        )
    except ModuleNotFoundError as error:
        raise SettingsError(f"loggers: wandb needs {error.name}: pip install -e '.[loggers]'") from None
    return logger


def _run_id(run_dir: Path) -> str:
    path = run_dir / _RUN_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
