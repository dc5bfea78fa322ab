"""Builders shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.config import CONFIGS, Settings, read_settings

torch.set_num_threads(1)

# A machine small enough to train for a few updates in well under a second.
TINY = [
    "--model.memory-rows=8",
    "--model.row-width=4",
    "--model.controller-size=6",
    "--task.num-bits=2",
    "--task.max-length=3",
    "--batch-size=2",
    "--num-updates=12",
    "--checkpoint-every-updates=4",
    "--evaluation.every-updates=5",
    "--evaluation.num-sequences=2",
    "--evaluation.num-long-sequences=2",
    "--evaluation.long-sizes=5",
]


@pytest.fixture
def tiny_arguments() -> list[str]:
    return list(TINY)


@pytest.fixture
def tiny_settings(tmp_path: Path) -> Callable[..., Settings]:
    def build(*overrides: str) -> Settings:
        arguments = [*TINY, f"--run-dir={tmp_path / 'run'}", *overrides]
        return read_settings(CONFIGS / "copy.toml", arguments, "test")

    return build
