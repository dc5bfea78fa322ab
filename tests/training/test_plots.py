"""Pictures show what the records and the machine hold; what they look like was looked at."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from training import plots
from training.__main__ import main
from training.config import make_cell
from training.model import unroll
from training.records import as_line
from training.tasks.copy import CopyTask


@pytest.fixture
def run_dir(tiny_arguments, tmp_path):
    assert main(["copy", *tiny_arguments, f"--run-dir={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


def test_a_trace_is_what_the_cell_does_step_by_step(tiny_settings):
    settings = tiny_settings("--model.num-read-heads=2", "--model.num-write-heads=3")
    torch.manual_seed(0)
    cell = make_cell(settings)

    traced = plots.trace(cell, settings.task, (4,), seed=5)

    inputs, targets, _ = settings.task.draw(1, (4,), torch.Generator().manual_seed(5))
    with torch.no_grad():
        outputs, final = unroll(cell, inputs)
    np.testing.assert_array_equal(traced.inputs, inputs[:, 0].T)
    np.testing.assert_array_equal(traced.targets[:, -4:], targets[:, 0].T)
    assert np.isnan(traced.targets[:, :-4]).all()
    np.testing.assert_allclose(traced.outputs, torch.sigmoid(outputs[:, 0]).T, rtol=1e-5)
    np.testing.assert_array_equal(traced.memory[-1], final.memory[0].T)
    np.testing.assert_array_equal(traced.reading[:, -1], final.read_weightings[0].amax(dim=0))
    np.testing.assert_array_equal(traced.writing[:, -1], final.write_weightings[0].amax(dim=0))
    np.testing.assert_array_equal(traced.read[:, -1], final.read_vectors[0].flatten())
    assert traced.added.shape == (4, 9)


def test_plot_makes_the_learning_curve_the_machine_and_the_animation_of_a_run(capsys, run_dir):
    assert main(["plot", str(run_dir)]) == 0

    for name in ("learning.png", "machine.png", "memory.gif"):
        assert (run_dir / name).stat().st_size > 5_000
    with Image.open(run_dir / "memory.gif") as animation:
        assert animation.n_frames == 7  # 2 T + 1, for the longest of training, T = 3.
    assert "memory.gif" in capsys.readouterr().out


def test_the_machine_is_drawn_with_as_many_rows_as_are_asked_for(run_dir, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_machine", lambda traced, *_: drawn.append(traced))
    monkeypatch.setattr(plots, "animate_memory", lambda *_: None)

    assert main(["plot", str(run_dir), "--memory-rows=20", "--size=9"]) == 0

    assert drawn[0].memory.shape == (19, 20, 4)


def test_rows_are_not_chosen_for_pictures_of_several_runs(capsys, run_dir):
    assert main(["plot", str(run_dir), str(run_dir), "--memory-rows=20"]) == 1

    assert "--memory-rows is for the pictures of one run" in capsys.readouterr().err


def test_an_animation_of_a_long_sequence_leaves_steps_out(run_dir, monkeypatch):
    monkeypatch.setattr(plots, "_MOST_FRAMES", 5)

    assert main(["plot", str(run_dir), "--size=6"]) == 0

    with Image.open(run_dir / "memory.gif") as animation:
        assert animation.n_frames == 5  # Every third of 13 steps.


def test_a_plain_network_is_plotted_without_a_memory(tiny_arguments, tmp_path):
    run = tmp_path / "run"
    arguments = [*tiny_arguments, "--model.architecture=plain", f"--run-dir={run}"]
    assert main(["copy", *arguments]) == 0

    assert main(["plot", str(run), "--size=5"]) == 0

    assert (run / "machine.png").exists()
    assert not (run / "memory.gif").exists()


def test_several_runs_or_folders_of_runs_share_a_picture_of_learning(tiny_arguments, tmp_path):
    for folder, seed in [("ntm", 0), ("ntm", 1), ("lstm", 0)]:
        run = tmp_path / folder / f"seed={seed}"
        run.parent.mkdir(exist_ok=True)
        assert main(["copy", *tiny_arguments, f"--seed={seed}", f"--run-dir={run}"]) == 0

    assert main(["plot", str(tmp_path / "ntm"), str(tmp_path / "lstm"), "--to", str(tmp_path / "out")]) == 0

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["learning.png"]


def test_a_curve_has_the_evaluations_and_nothing_else(run_dir):
    curve = plots.read_curve(run_dir, 12)

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert curve.sequences == [10, 20, 24]
    assert curve.costs == [line["cost_bits"] for line in lines if line["update"] in (5, 10, 12)]


def test_a_curve_knows_what_was_found_beyond_training_and_where_the_run_began_again(tiny_arguments, tmp_path):
    arguments = [*tiny_arguments, "--restart-every-updates=10", "--evaluation.enough=0"]
    assert main(["copy", *arguments, f"--run-dir={tmp_path}"]) == 0

    curve = plots.read_curve(tmp_path, 12)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["wrong_bits_at_5"] for line in lines if line["update"] in (5, 10, 12)]
    assert curve.longer == {"wrong_bits_at_5": found}
    assert curve.restarts == [22]  # Update 11, of two sequences each.


def test_a_damaged_line_or_an_evaluation_that_is_no_number_is_left_out_of_a_curve(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = b"\xff\xfe" + lines[4]
    tenth = json.loads(lines[9]) | {"cost_bits": math.inf}
    lines[9] = as_line({name: value for name, value in tenth.items() if name != "crc32"}).encode()
    path.write_bytes(b"".join(lines) + b'{"torn": ')

    curve = plots.read_curve(run_dir, 12)

    assert (curve.sequences, curve.num_missing) == ([24], 1)
    assert main(["plot", str(run_dir)]) == 0


def test_a_run_without_an_evaluation_keeps_no_other_from_being_drawn(capsys, tiny_arguments, tmp_path):
    first = [*tiny_arguments, "--cpu-minutes=1e-9", f"--run-dir={tmp_path / 'runs' / 'a'}"]
    assert main(["copy", *first]) == 0
    assert main(["plot", str(tmp_path / "runs" / "a")]) == 1
    assert "there is no evaluation to draw yet" in capsys.readouterr().err
    assert main(["copy", *tiny_arguments, f"--run-dir={tmp_path / 'runs' / 'b'}"]) == 0

    assert main(["plot", str(tmp_path / "runs")]) == 0

    assert "a has no evaluation yet, and is left out" in capsys.readouterr().err
    assert (tmp_path / "runs" / "learning.png").exists()


def test_runs_of_one_name_in_two_folders_are_both_drawn(tiny_arguments, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        assert main(["copy", *tiny_arguments, f"--run-dir={tmp_path / folder / 'run'}"]) == 0
    drawn = []
    monkeypatch.setattr(plots, "plot_learning", lambda groups, *_: drawn.append(groups))

    main(["plot", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "--to", str(tmp_path)])

    assert len(drawn[0]) == 2


def test_sizes_of_one_number_stand_at_their_places_and_what_is_no_number_is_left_out(tmp_path, monkeypatch):
    axes = []
    subplots = plots.plt.subplots

    def kept(*given, **named):
        figure, made = subplots(*given, **named)
        axes.append(made)
        return figure, made

    monkeypatch.setattr(plots.plt, "subplots", kept)
    rows = [{"size": "10", "wrong_bits": 1.0}, {"size": "20", "wrong_bits": math.inf}]
    rows.append({"size": "120", "wrong_bits": 3.0})

    plots.plot_evaluation({"run": {"sizes": rows}}, ("length",), tmp_path / "a.png")
    plots.plot_evaluation(
        {"run": {"sizes": [{"size": "2x3", "wrong_bits": 0.0}]}}, ("a", "b"), tmp_path / "b.png"
    )

    assert axes[0].lines[0].get_xdata().tolist() == [10, 20, 120]
    assert axes[0].lines[0].get_ydata()[2] == 3
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["2x3"]


def test_a_curve_is_above_what_the_best_predictor_pays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        as_line({"update": 1, "sequences": 10, "cost_bits": 150, "cost_over_optimal": 1.25})
    )

    assert plots.read_curve(tmp_path, 1) == plots.Curve([10], [30.0], restarts=[])


def test_a_run_that_ended_early_stays_at_its_last_cost():
    curve = plots.Curve([10, 20], [5.0, 3.0])

    assert plots._carried(curve.sequences, curve.costs, np.array([5, 10, 15, 20, 40])).tolist() == [
        5,
        5,
        5,
        3,
        3,
    ]


@pytest.mark.parametrize(
    ("attended", "expected"),
    [
        ([2, 3, 4], [1, 2, 3, 4, 5]),
        ([15, 0, 1], [14, 15, 0, 1, 2]),
        ([], list(range(16))),
        (list(range(16)), list(range(16))),
    ],
)
def test_weightings_are_shown_where_on_the_ring_the_heads_are(attended, expected):
    weighting = np.zeros((16, 3), np.float32)
    weighting[attended, 1] = 0.8

    assert plots._attended(weighting).tolist() == expected


def test_a_folder_without_runs_is_refused(capsys, tmp_path):
    assert main(["plot", str(tmp_path)]) == 1

    assert "is not a run, and holds none: train there first" in capsys.readouterr().err


def test_the_heading_says_what_the_sequence_is():
    assert plots.heading(CopyTask(), (20,)) == "copy, length 20"


def test_a_dnc_is_drawn_with_its_usage_and_its_gates(tiny_settings, tmp_path, monkeypatch):
    settings = tiny_settings("--model.architecture=dnc", "--model.num-read-heads=2")
    torch.manual_seed(0)
    cell = make_cell(settings)
    drawn = []
    monkeypatch.setattr(plots, "_image", lambda _axes, name, values, *_: drawn.append((name, values.shape)))

    traced = plots.trace(cell, settings.task, (4,))
    plots.plot_machine(traced, "DNC", tmp_path / "machine.png")

    with torch.no_grad():
        _, final = unroll(cell, settings.task.draw(1, (4,), torch.Generator().manual_seed(0)).inputs)
    np.testing.assert_array_equal(traced.usage[:, -1], final.usage[0])
    modes = ["free", "backward", "content", "forward"]
    gates = ["write", "allocate", *(f"{mode} {head}" for head in (1, 2) for mode in modes)]
    assert list(traced.gates) == gates
    assert dict(drawn)["usage"] == (8, 9)
    assert dict(drawn)["gates and read modes"] == (10, 9)
