"""Several processes, started by torchrun, make the run that one process makes of as large a batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training import checkpoint
from training.__main__ import main
from training.checkpoint import LAST

ROOT = Path(__file__).parents[2]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "training", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tiny_arguments, tmp_path):
    """A smooth machine and Adam, whose early steps do not magnify rounding as a running mean's first roots do."""
    common = [*tiny_arguments, "--num-updates=20", "--optimizer.name=adam", "--optimizer.average-decay=0.9"]
    one, two = tmp_path / "one", tmp_path / "two"

    assert main(["copy", *common, "--batch-size=8", f"--run-dir={one}"]) == 0
    ended = torchrun(["copy", *common, "--batch-size=4", f"--run-dir={two}"])

    assert ended.returncode == 0, ended.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    alone, together = checkpoint.load(one / LAST), checkpoint.load(two / LAST)
    assert together.update == alone.update == 20
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-3)


def test_a_run_directory_in_use_ends_all_processes(tiny_arguments, tmp_path):
    (tmp_path / "notes.txt").write_text("somebody's")

    ended = torchrun(["copy", *tiny_arguments, f"--run-dir={tmp_path}"])

    assert ended.returncode != 0
    assert "give another --run-dir" in ended.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "lock"] == ["notes.txt"]
