"""Builders shared by the tests of export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.__main__ import main
from export.publish import MODEL_FILE
from training import checkpoint
from training.checkpoint import BEST, Checkpoint
from training.config import CONFIGS, make_cell, read_settings

torch.set_num_threads(1)

SMALL = ["--model.memory-rows=12", "--model.row-width=5", "--model.controller-size=9", "--task.num-bits=3"]


def write_run(run_dir: Path, *overrides: str) -> Path:
    """A run directory with the checkpoint of an untrained cell."""
    settings = read_settings(CONFIGS / "copy.toml", [*SMALL, *overrides], "test")
    torch.manual_seed(settings.seed)
    cell = make_cell(settings)
    run_dir.mkdir(parents=True)
    content = Checkpoint(
        settings=settings.model_dump(mode="json"),
        command="python -m training copy --seed 7",
        update=10,
        seconds=1.5,
        cpu_seconds=1.25,
        cell=cell.state_dict(),
        averaged=cell.state_dict(),
        optimizer={},
        random_state=torch.get_rng_state(),
        sequences_state=torch.get_rng_state(),
        metrics={"wrong_bits": 2.5, "wrong_bits_at_120": 40.0},
        best_score=42.5,
        solved={},
        learning_rate=1e-3,
        num_sizes=20,
        attempt_began=0,
        num_averaged=10,
        num_diverged=0,
        num_skipped=0,
        num_skipped_in_a_row=0,
        versions=checkpoint.versions(),
    )
    checkpoint.save(content, run_dir / BEST)
    return run_dir


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", "--seed=7")


@pytest.fixture(scope="session")
def model_file(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the command line makes of `run_dir`, at `small/3`; exporting takes seconds, so once."""
    target = tmp_path_factory.mktemp("models") / "small" / "3"
    assert main([str(run_dir), str(target)]) == 0
    return target / MODEL_FILE
