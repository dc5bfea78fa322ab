"""What is recorded of a run goes to other loggers as well."""

from __future__ import annotations

import sys
import types

import pytest
from lightning_fabric.loggers.logger import Logger
from rich.console import Console

from training.errors import SettingsError
from training.loop import train


class Kept(Logger):
    """Keeps what it is told."""

    def __init__(self, run_dir):
        self.run_dir, self.metrics, self.settings, self.status = run_dir, [], None, None
        made.append(self)

    name = version = "kept"

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings = params

    def finalize(self, status):
        self.status = status


made: list[Kept] = []


@pytest.fixture
def own_loggers(monkeypatch):
    made.clear()
    monkeypatch.setitem(sys.modules, "own_loggers", types.SimpleNamespace(Kept=Kept, number=3))


def run(settings, resume=False):
    train(settings, "command", resume=resume, console=Console(quiet=True))


def test_a_logger_by_its_import_path_is_told_the_settings_and_the_records_of_every_update(
    tiny_settings, own_loggers
):
    settings = tiny_settings("--loggers=own_loggers:Kept", "--num-updates=5")

    run(settings)

    [logger] = made
    assert logger.run_dir == settings.run_dir
    assert logger.settings["task"]["name"] == "copy"
    assert [step for step, _ in logger.metrics] == [1, 2, 3, 4, 5]
    assert "loss" in logger.metrics[0][1]
    assert "wrong_bits" in logger.metrics[4][1]
    assert logger.status == "success"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "'tensorbord' is neither wandb nor an import path"),
        ("own_loggers:Other", "has no 'Other'"),
        ("own_loggers:number", "is no Logger of lightning_fabric, nor makes one"),
    ],
)
def test_what_is_no_logger_is_refused_before_the_run_begins(tiny_settings, own_loggers, name, said):
    with pytest.raises(SettingsError, match=said):
        run(tiny_settings(f"--loggers={name}"))


def test_weights_and_biases_are_told_how_to_be_installed_where_they_are_not(tiny_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", None)

    with pytest.raises(SettingsError, match=r"pip install -e '\.\[loggers\]'"):
        run(tiny_settings("--loggers=wandb"))


def test_a_resumed_run_goes_on_in_weights_and_biases(tiny_settings, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("pytorch_lightning")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = tiny_settings("--loggers=wandb", "--num-updates=2")

    run(settings)
    identity = (settings.run_dir / "wandb_id").read_text()
    run(settings.model_copy(update={"num_updates": 4}), resume=True)

    runs = [path.name for path in (settings.run_dir / "wandb").glob("offline-run-*")]
    assert runs
    assert all(name.endswith(identity) for name in runs)
