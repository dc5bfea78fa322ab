"""The evaluate command: a table, a file and a picture of a run's errors by size."""

from __future__ import annotations

import json

import pytest

from training.__main__ import main
from training.checkpoint import BEST, load, restore_cell
from training.evaluate import measure
from training.report import EVALUATION, report


@pytest.fixture
def run_dir(tiny_arguments, tmp_path):
    assert main(["copy", *tiny_arguments, f"--run-dir={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def test_a_run_is_measured_at_the_sizes_of_training_and_those_beyond(capsys, run_dir):
    assert main(["evaluate", str(run_dir), "--num-sequences=3"]) == 0

    result = json.loads((run_dir / EVALUATION).read_text())
    assert [row["size"] for row in result["sizes"]] == ["1", "2", "3", "5"]
    cell, settings = restore_cell(load(run_dir / BEST))
    assert result["sizes"][3] == {"size": "5", **measure(cell, settings.task, (5,), 3, seed=3_000_000)}
    said = capsys.readouterr().out
    assert "length │ wrong bits │ cost in bits" in said.replace("┃", "│")
    assert f"{result['sizes'][3]['wrong_bits']:.2f}" in said
    assert (run_dir / "evaluation.png").stat().st_size > 5_000


def test_sizes_that_are_asked_for_are_the_ones_measured(run_dir):
    assert main(["evaluate", str(run_dir), "--sizes=4,7", "--num-sequences=2"]) == 0

    assert [row["size"] for row in report(run_dir, [(4,), (7,)], 2)["sizes"]] == ["4", "7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes=20x10"], "--sizes: '20x10' is not a size of copy: length, such as 3"),
        (["--num-sequences=0"], "invalid _positive value|argument --num-sequences"),
        (["--speed=9"], "unrecognized arguments: --speed=9"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(capsys, run_dir, arguments, message):
    assert main(["evaluate", str(run_dir), *arguments]) == 1

    said = capsys.readouterr().err
    assert any(part in said for part in message.split("|"))
    assert "Traceback" not in said
    assert not (run_dir / EVALUATION).exists()


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 1

    assert "has no checkpoint best.pt: train there first" in capsys.readouterr().err
