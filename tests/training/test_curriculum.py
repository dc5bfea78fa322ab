"""How a run begins, what sizes it draws and how large its steps are."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

from training import checkpoint
from training.checkpoint import BEST, LAST
from training.errors import CheckpointError, SettingsError
from training.loop import train
from training.records import METRICS


def run(settings, resume=False):
    train(settings, "command", resume=resume, console=Console(quiet=True))
    return [json.loads(line) for line in (settings.run_dir / METRICS).read_text().splitlines()]


def weights(path):
    return checkpoint.load(path).cell


def test_the_step_size_grows_at_the_start_and_falls_along_half_a_cosine(tiny_settings):
    settings = tiny_settings(
        "--optimizer.warmup-updates=4", "--optimizer.schedule=cosine", "--optimizer.learning-rate=1e-3"
    )

    rates = [record["learning_rate"] for record in run(settings)]

    expected = [
        1e-3 * min(1, (update + 1) / 4) * (1 + math.cos(math.pi * update / 12)) / 2 for update in range(12)
    ]
    assert rates == pytest.approx(expected)


def test_the_step_size_grows_anew_where_the_run_begins_again_and_is_settled_until_then(
    tiny_settings, monkeypatch
):
    scores = iter([1e-9, 5.0, 5.0])
    monkeypatch.setattr("training.loop.evaluate", lambda *_arguments: {"wrong_bits": next(scores)})
    settings = tiny_settings(
        "--optimizer.warmup-updates=2",
        "--optimizer.learning-rate=1e-3",
        "--optimizer.settled-learning-rate=1e-4",
        "--restart-every-updates=8",
        "--evaluation.every-updates=4",
        "--evaluation.enough=0",
        "--num-updates=10",
    )

    rates = [record["learning_rate"] for record in run(settings)]

    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, *[1e-4] * 4, 5e-4, 1e-3])


def test_a_curriculum_opens_the_next_sizes_when_the_largest_is_mastered(tiny_settings, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "training.loop.is_mastered", lambda _cell, _settings, size: not asked.append(size) and len(asked) > 1
    )
    settings = tiny_settings(
        "--curriculum.first-sizes=1",
        "--curriculum.add-sizes=5",
        "--evaluation.every-updates=4",
        "--num-updates=60",
    )

    records = run(settings)

    assert [record["open_sizes"] for record in records] == [1] * 8 + [3] * 52
    assert {record["steps"] for record in records[:8]} == {3}
    assert {record["steps"] for record in records[8:]} == {3, 5, 7}
    assert asked == [(1,), (1,)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--curriculum.first-sizes=1", "--curriculum.mastered-below=1000", "--evaluation.every-updates=4"],
        ["--mix-sizes", "--optimizer.warmup-updates=9"],
    ],
)
def test_a_run_that_is_resumed_is_the_unbroken_one(tiny_settings, tmp_path, flags):
    broken = tiny_settings("--num-updates=7", *flags)
    run(broken)
    records = run(broken.model_copy(update={"num_updates": 14}), resume=True)

    unbroken = tiny_settings("--num-updates=14", *flags, f"--run-dir={tmp_path / 'unbroken'}")

    assert [record["loss"] for record in records] == [record["loss"] for record in run(unbroken)]


def test_sequences_of_mixed_sizes_are_trained_on_in_one_batch(tiny_settings):
    records = run(tiny_settings("--mix-sizes", "--batch-size=32", "--num-updates=3"))

    assert [record["steps"] for record in records] == [
        7,
        7,
        7,
    ]  # Of 32 sequences one has the greatest length, 3.


def test_a_run_can_start_from_the_best_weights_of_another(tiny_settings, tmp_path):
    run(tiny_settings())
    best = checkpoint.load(tmp_path / "run" / BEST).averaged
    for path in (tmp_path / "run", tmp_path / "run" / BEST):
        settings = tiny_settings(
            f"--init-from={path}",
            f"--run-dir={tmp_path / path.name}-next",
            "--num-updates=1",
            "--optimizer.learning-rate=1e-12",
            "--seed=5",
        )
        run(settings)

        started = weights(settings.run_dir / LAST)
        assert all(torch.allclose(started[name], tensor, atol=1e-9) for name, tensor in best.items())


def test_weights_for_other_rows_are_taken_where_no_row_has_its_own(tiny_settings, tmp_path):
    run(tiny_settings("--num-updates=2"))

    settings = tiny_settings(
        f"--init-from={tmp_path / 'run'}",
        f"--run-dir={tmp_path / 'next'}",
        "--model.memory-rows=16",
        "--num-updates=1",
    )
    run(settings)

    assert weights(settings.run_dir / LAST)["initial_memory"].shape == (16, 4)


def test_weights_of_another_model_and_of_no_run_are_refused(tiny_settings, tmp_path):
    run(tiny_settings("--num-updates=1"))

    with pytest.raises(CheckpointError, match="weights are of another model: size mismatch"):
        run(
            tiny_settings(
                f"--init-from={tmp_path / 'run'}",
                f"--run-dir={tmp_path / 'next'}",
                "--model.controller-size=7",
            )
        )
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        run(tiny_settings(f"--init-from={tmp_path}", f"--run-dir={tmp_path / 'other'}"))


def test_a_curriculum_without_sizes_to_add_is_refused(tiny_settings):
    with pytest.raises(
        SettingsError, match=r"curriculum\.first_sizes 3 is no less than the 3 sizes of the task"
    ):
        tiny_settings("--curriculum.first-sizes=3")
