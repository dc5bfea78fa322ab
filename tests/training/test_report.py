"""The evaluate command: a table, a file and a picture of a run's errors by size."""

from __future__ import annotations

import json

import pytest
import torch

from training.__main__ import main
from training.checkpoint import BEST, load, restore_cell
from training.evaluate import measure
from training.model import unroll, with_memory_rows
from training.report import EVALUATION, interval, report


@pytest.fixture
def run_dir(tiny_arguments, tmp_path):
    assert main(["copy", *tiny_arguments, f"--run-dir={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def test_a_run_is_measured_at_the_sizes_of_training_and_those_beyond(capsys, run_dir):
    assert main(["evaluate", str(run_dir), "--num-sequences=3"]) == 0

    result = json.loads((run_dir / EVALUATION).read_text())
    assert [row["size"] for row in result["sizes"]] == ["1", "2", "3", "5"]
    cell, settings = restore_cell(load(run_dir / BEST))
    measured = measure(cell, settings.task, (5,), 3, seed=3_000_000)
    assert {name: result["sizes"][3][name] for name in measured} == pytest.approx(measured)
    assert result["sizes"][3]["num_sequences"] == 3
    assert result["memory_rows"] == 8
    said = capsys.readouterr().out
    assert "length │ wrong bits │ cost in bits" in said.replace("┃", "│")
    assert f"{result['sizes'][3]['wrong_bits']:.2f}" in said
    assert (run_dir / "evaluation.png").stat().st_size > 5_000


def test_sizes_that_are_asked_for_are_the_ones_measured(run_dir):
    assert main(["evaluate", str(run_dir), "--sizes=4,7", "--num-sequences=2"]) == 0

    assert [row["size"] for row in report(run_dir, [(4,), (7,)], 2)["sizes"]] == ["4", "7"]


def test_a_run_is_measured_with_as_many_rows_as_are_asked_for(capsys, run_dir):
    assert main(["evaluate", str(run_dir), "--memory-rows=32", "--sizes=7", "--num-sequences=4"]) == 0

    result = json.loads((run_dir / EVALUATION).read_text())
    cell, settings = restore_cell(load(run_dir / BEST))
    measured = measure(with_memory_rows(cell, 32), settings.task, (7,), 4, seed=3_000_000)
    assert {name: result["sizes"][0][name] for name in measured} == pytest.approx(measured)
    assert result["memory_rows"] == 32
    assert "32 memory rows" in capsys.readouterr().out.replace("\n", " ")


def test_patterns_that_random_sequences_hide_are_measured_as_well(capsys, run_dir):
    assert main(["evaluate", str(run_dir), "--sizes=4", "--num-sequences=3"]) == 0

    [row] = json.loads((run_dir / EVALUATION).read_text())["sizes"]
    assert list(row["patterns"]) == ["zeros", "equal", "one-bit", "periodic"]
    cell, settings = restore_cell(load(run_dir / BEST))
    inputs, _, _ = settings.task.draw_patterned("zeros", 1, (4,), torch.Generator())
    with torch.no_grad():
        answers = unroll(cell, inputs)[0][-4:]
    assert row["patterns"]["zeros"]["wrong_bits"] == float((answers > 0).sum())
    assert "one-bit" in capsys.readouterr().out


def test_patterns_can_be_chosen_or_left_out(capsys, run_dir):
    arguments = ["evaluate", str(run_dir), "--sizes=4", "--num-sequences=3"]

    assert main([*arguments, "--patterns=periodic,zeros"]) == 0
    assert list(json.loads((run_dir / EVALUATION).read_text())["sizes"][0]["patterns"]) == [
        "zeros",
        "periodic",
    ]
    assert main([*arguments, "--patterns=none"]) == 0
    assert json.loads((run_dir / EVALUATION).read_text())["sizes"][0]["patterns"] == {}
    assert "not random" not in capsys.readouterr().out.rpartition("after update")[2]


def test_a_share_is_given_with_wilsons_interval():
    # By hand, z^2 = 3.8416: 0 of 256 to z^2 / (256 + z^2); 5 of 10 is 0.5 +- 1.96 / (2 sqrt(10 + z^2)).
    assert interval(0, 256) == pytest.approx((0, 3.8416 / 259.8416))
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-rows=2"], "--memory-rows 2: heads that reach so far need at least 3 rows"),
        (["--patterns=ones"], "--patterns: 'ones' is none of zeros, equal, one-bit, periodic"),
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
