"""Tasks and data that are not in this tree, from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from training.__main__ import main
from training.checkpoint import BEST, load, restore_cell
from training.tasks.lookup import task_class

OWN = """
from typing import ClassVar
from training.losses import LOSSES
from training.tasks import Sequences, Task
from training.tasks.copy import CopyTask
import torch

class ParityTask(Task):
    '''Whether the bits so far are odd in number: one of two classes at each step.'''

    size_names: ClassVar = ("steps",)
    loss: ClassVar = LOSSES["cross-entropy"]
    input_size: ClassVar = 1
    output_size: ClassVar = 2
    input_description: ClassVar = "a bit"
    output_description: ClassVar = "even, odd"

    longest: int = 4
    '''Steps in the longest sequence.'''

    def sizes(self):
        return [(steps,) for steps in range(1, self.longest + 1)]

    def draw(self, batch_size, size, generator):
        bits = torch.randint(0, 2, (size[0], batch_size), generator=generator)
        return Sequences(bits.unsqueeze(-1).float(), bits.cumsum(dim=0) % 2)

class Unfinished(Task):
    size_names: ClassVar = ("steps",)

broken = 1
"""
SMALL = ["--num-updates=4", "--model.memory-rows=8", "--model.controller-size=6", "--batch-size=2"]
SMALL += ["--evaluation.every-updates=2", "--evaluation.num-sequences=3"]


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    task_class.cache_clear()
    return tmp_path


def test_a_task_by_its_import_path_is_trained_evaluated_and_drawn(own_tasks, capsys):
    assert main(["own_tasks:ParityTask", *SMALL]) == 0
    assert main(["evaluate", "runs/ParityTask", "--num-sequences=3"]) == 0
    assert main(["plot", "runs/ParityTask"]) == 0

    assert "wrong symbols" in capsys.readouterr().out
    row = json.loads((own_tasks / "runs" / "ParityTask" / "evaluation.json").read_text())["sizes"][0]
    assert {"wrong_symbols", "error_rate", "cost_bits"} <= row.keys()
    _, settings = restore_cell(load(own_tasks / "runs" / "ParityTask" / BEST))
    assert settings.task.name == "own_tasks:ParityTask"


def test_a_toml_of_ones_own_names_the_task_and_its_settings(own_tasks):
    (own_tasks / "parity.toml").write_text(
        'run_dir = "runs/parity"\n[task]\nname = "own_tasks:ParityTask"\nlongest = 3\n'
    )

    assert main(["parity.toml", *SMALL, "--task.longest=2"]) == 0

    assert load(own_tasks / "runs" / "parity" / BEST).settings["task"] == {
        "name": "own_tasks:ParityTask",
        "longest": 2,
    }


def test_a_sweep_can_be_of_an_experiment_of_ones_own(own_tasks, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{own_tasks}:{__file__.rpartition('/tests/')[0]}")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")

    assert main(["sweep", "own_tasks:ParityTask", *SMALL, "--seeds=3", "--to=runs/seeds"]) == 0

    assert (own_tasks / "runs" / "seeds" / "seed=3" / BEST).exists()


def test_sequences_of_a_file_are_trained_on_and_judged_by(own_tasks):
    random = np.random.default_rng(0)
    for name in ("train", "validation"):
        symbols = random.integers(0, 3, (20, 6))
        np.savez(f"{name}.npz", inputs=symbols, targets=symbols.max(axis=1, keepdims=True))
    (own_tasks / "largest.toml").write_text(
        'run_dir = "runs/largest"\n[task]\nname = "dataset"\ntrain = "train.npz"\nvalidation = "validation.npz"\n'
        'num_symbols = 3\nnum_classes = 3\nloss_name = "cross-entropy"\n'
    )

    assert main(["largest.toml", *SMALL]) == 0

    assert main(["evaluate", "runs/largest", "--num-sequences=20"]) == 0
    assert main(["plot", "runs/largest"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["own_tasks:Unfinished"],
            "does not say its draw, input_description, input_size, output_description",
        ),
        (["own_tasks:broken"], "'own_tasks:broken' is no subclass of training.tasks.Task"),
        (["own_tasks:Other"], "the module 'own_tasks' has no 'Other'"),
        (["nowhere:Task"], "there is no module 'nowhere': run where it is, or add its folder to PYTHONPATH"),
        (["none.toml"], "cannot read the settings in none.toml"),
        (["cpoy"], "unknown experiment 'cpoy': there are associative-recall"),
        (["own_tasks:ParityTask", "--task.longest=x"], "task.longest"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused_in_a_sentence(own_tasks, capsys, arguments, said):
    assert main(arguments) == 1

    printed = capsys.readouterr().err
    assert said in printed.replace("\n", " ")
    assert "Traceback" not in printed
