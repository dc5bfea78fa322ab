"""The training speed script measures updates that train, and compares the right figures."""

from __future__ import annotations

import sys

import pytest

from benchmarks import training_speed
from benchmarks.measuring import Figure
from benchmarks.peers.trainers import updates_per_s


@pytest.mark.parametrize("is_compiled", [True, False])
def test_updates_are_made_and_counted_with_and_without_the_kernel(is_compiled):
    assert updates_per_s(training_speed.update(is_compiled, batch_size=2, length=3), duration_s=0.01) > 0


def test_a_peer_is_held_against_this_project_at_its_own_batch_and_its_default_against_the_best():
    def figure(rate: float) -> dict[str, Figure]:
        return {"sequences_per_s": Figure(rate, rate, rate)}

    own = {
        f"this project, batch {batch}": figure(rate)
        for batch, rate in {1: 100, 16: 900, 32: 1300, 64: 1600, 128: 1500}.items()
    }
    peer = {f"pytorch-ntm, batch {batch}": figure(rate) for batch, rate in {1: 10, 16: 100, 32: 130}.items()}
    figures = own | peer

    ratios = training_speed._ratios(figures, ["pytorch-ntm"])

    assert ratios == {
        "pytorch-ntm, batch 1": (10, 5),
        "pytorch-ntm, batch 16": (9, 10),
        "pytorch-ntm, batch 32": (10, 10),
        "this project, batch 64, over pytorch-ntm's default": (160, 50),
    }


def test_the_script_runs_without_a_peer_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_speed, "RESULT", tmp_path / "training_speed.json")
    monkeypatch.setattr(training_speed, "_BATCHES", (1,))
    monkeypatch.setattr(training_speed, "_LENGTHS", (1, 2))
    monkeypatch.setattr(sys, "argv", ["training_speed", "--rounds=1", "--seconds=0.01"])

    assert training_speed.main() == 0

    assert "this project, batch 1" in (tmp_path / "training_speed.json").read_text()
    assert "sequences/s" in capsys.readouterr().out
