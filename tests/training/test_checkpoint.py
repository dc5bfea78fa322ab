"""Checkpoints are whole or refused."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from training import checkpoint
from training.checkpoint import LAST
from training.errors import CheckpointError, NonFiniteError
from training.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tiny_settings):
    settings = tiny_settings("--num-updates=1")
    train(settings, "command", resume=False, console=Console(quiet=True))
    return settings.run_dir


def test_a_saved_cell_comes_back_with_the_same_bits(run_dir, tmp_path):
    loaded = checkpoint.load(run_dir / LAST)

    checkpoint.save(loaded, tmp_path / "again.pt")
    again = checkpoint.load(tmp_path / "again.pt")

    assert again.settings == loaded.settings
    assert all(torch.equal(again.cell[name], tensor) for name, tensor in loaded.cell.items())
    cell, _settings = checkpoint.restore_cell(again)
    assert all(torch.equal(cell.state_dict()[name], tensor) for name, tensor in loaded.cell.items())


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no checkpoint last\.pt: train there first"):
        checkpoint.load(tmp_path / LAST)


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(run_dir, kept):
    path = run_dir / LAST
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])

    with pytest.raises(CheckpointError, match="is truncated, or not a checkpoint"):
        checkpoint.load(path)


def test_a_checkpoint_with_one_bit_flipped_is_refused_wherever_it_is(run_dir):
    path = run_dir / LAST
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 50):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)

        with pytest.raises(CheckpointError, match=r"is damaged|is truncated, or not a checkpoint"):
            checkpoint.load(path)


def test_a_checkpoint_with_a_block_of_zeros_is_refused(run_dir):
    path = run_dir / LAST
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + bytes(4096) + whole[8192:])

    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path)


def test_a_checkpoint_of_an_earlier_version_is_refused(run_dir):
    torch.save({"format": 2}, run_dir / LAST)

    with pytest.raises(CheckpointError, match="or not a checkpoint of this version"):
        checkpoint.load(run_dir / LAST)


@pytest.mark.parametrize("name", ["cell", "averaged"])
def test_weights_that_are_not_finite_are_not_saved(run_dir, name):
    loaded, before = checkpoint.load(run_dir / LAST), (run_dir / LAST).read_bytes()
    getattr(loaded, name)["heads.bias"][0] = float("inf")

    with pytest.raises(NonFiniteError, match="no longer finite"):
        checkpoint.save(loaded, run_dir / LAST)

    assert (run_dir / LAST).read_bytes() == before


def test_a_checkpoint_says_what_it_was_made_with(run_dir):
    made_with = checkpoint.load(run_dir / LAST).versions

    assert made_with["torch"] == importlib.metadata.version("torch")
    assert {"python", "numpy", "numba", "lightning-fabric"} < made_with.keys()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / LAST).write_bytes(pickle.dumps(Attack(), protocol=2))

    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / LAST)
    assert not (tmp_path / "attacked").exists()


def test_a_failure_while_saving_leaves_the_last_checkpoint_whole(run_dir, monkeypatch):
    before = (run_dir / LAST).read_bytes()
    loaded = checkpoint.load(run_dir / LAST)

    def fail(_descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"no space left on device.* the one before is still there"):
        checkpoint.save(loaded, run_dir / LAST)

    assert (run_dir / LAST).read_bytes() == before
    assert not (run_dir / LAST).with_suffix(".tmp").exists()


def test_a_disk_that_fills_up_while_saving_leaves_the_last_checkpoint_and_says_so(run_dir):
    """The system's own limit on the size of files stands for the full disk: writing fails half way."""
    before = (run_dir / LAST).read_bytes()
    program = (
        "import resource, signal, sys; from pathlib import Path; from training import checkpoint;"
        "path = Path(sys.argv[1]); loaded = checkpoint.load(path);"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, -1));"
        "checkpoint.save(loaded, path)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program, run_dir / LAST], cwd=ROOT, capture_output=True, text=True
    )

    assert "CheckpointError" in ended.stderr.splitlines()[-1]
    assert "the one before is still there; make room and --resume" in ended.stderr
    assert (run_dir / LAST).read_bytes() == before
    assert not (run_dir / LAST).with_suffix(".tmp").exists()


def test_weights_that_do_not_fit_the_settings_are_refused(run_dir):
    loaded = checkpoint.load(run_dir / LAST)
    settings = loaded.settings | {"model": loaded.settings["model"] | {"memory_rows": 16}}

    with pytest.raises(CheckpointError, match="weights are of another model"):
        checkpoint.restore_cell(loaded._replace(settings=settings))


def test_settings_of_another_version_are_refused(run_dir):
    loaded = checkpoint.load(run_dir / LAST)

    with pytest.raises(CheckpointError, match="settings are not of this version"):
        checkpoint.restore_cell(loaded._replace(settings=loaded.settings | {"old_setting": 1}))
