"""Evaluation counts what it says it counts."""

from __future__ import annotations

import math

import pytest
import torch

from training import evaluate as evaluation
from training.config import CONFIGS, make_cell, read_settings
from training.evaluate import evaluate, is_solved, judge, measure, total
from training.model import unroll, with_memory_rows
from training.tasks.copy import CopyTask
from training.tasks.dynamic_ngrams import DynamicNGramsTask


def saying(settings, logit: float) -> torch.nn.Module:
    """A cell that says the same at every step."""
    cell = make_cell(settings)
    torch.nn.init.zeros_(cell.output.weight)
    torch.nn.init.constant_(cell.output.bias, logit)
    return cell


def test_a_model_that_says_nothing_gets_every_set_bit_wrong(tiny_settings):
    settings = tiny_settings()
    drawn = settings.task.draw(10, (4,), torch.Generator().manual_seed(9 + 4))

    measured = measure(saying(settings, -1), settings.task, (4,), 10, seed=9)

    assert measured["wrong_bits"] * 10 == drawn.targets.sum()


def test_a_model_that_does_not_know_pays_a_bit_for_each_bit(tiny_settings):
    settings = tiny_settings()

    measured = measure(saying(settings, 0), settings.task, (4,), 10)

    assert measured["cost_bits"] == pytest.approx(4 * settings.task.num_bits)


def test_scores_name_each_size_and_are_the_same_each_time(tiny_settings):
    settings = tiny_settings()
    cell = make_cell(settings)

    scores = evaluate(cell, settings)

    assert list(scores) == ["wrong_bits", "cost_bits", "wrong_bits_at_5"]
    assert scores == evaluate(cell, settings)
    lengths = [measure(cell, settings.task, (length,), 2)["wrong_bits"] for length in (1, 2, 3)]
    assert scores["wrong_bits"] == sum(lengths) / 3


def test_a_task_whose_optimum_is_not_free_is_scored_by_the_cost_over_it():
    settings = read_settings(CONFIGS / "dynamic-ngrams.toml", ["--task.num-bits=30"], "test")
    task = settings.task

    scores = evaluate(saying(settings, 0), settings)

    optimal = measure(saying(settings, 0), task, (30,), settings.evaluation.num_sequences)["optimal_bits"]
    assert scores["cost_over_optimal"] == pytest.approx(29 / optimal)
    assert total(scores, task) == scores["cost_over_optimal"]


def test_a_task_is_solved_below_its_goal():
    assert is_solved({"wrong_bits": 0.09, "wrong_bits_at_120": 400}, CopyTask())
    assert not is_solved({"wrong_bits": 0.1}, CopyTask())
    assert is_solved({"wrong_bits": 40, "cost_over_optimal": 1.01}, DynamicNGramsTask())
    assert not is_solved({"wrong_bits": 40, "cost_over_optimal": 1.02}, DynamicNGramsTask())


def test_checkpoints_are_chosen_by_the_goals_measure_at_all_sizes():
    scores = {"wrong_bits": 1.0, "cost_bits": 9.0, "wrong_bits_at_40": 2.0, "wrong_bits_at_80": math.inf}

    assert total(scores, CopyTask()) == math.inf
    assert total(scores | {"wrong_bits_at_80": 3.0}, CopyTask()) == 6


@pytest.mark.parametrize("most_state", [1, 150, 10**9])
def test_sequences_are_judged_one_by_one_however_many_run_side_by_side(
    tiny_settings, monkeypatch, most_state
):
    settings = tiny_settings()
    torch.manual_seed(0)
    cell = make_cell(settings)
    sequences = settings.task.draw(5, (4,), torch.Generator().manual_seed(0))
    monkeypatch.setattr(evaluation, "_MOST_STATE", most_state)

    judged = judge(cell, settings.task, sequences)

    with torch.no_grad():
        answers = torch.sigmoid(unroll(cell, sequences.inputs)[0][-4:])
    said_right = torch.where(sequences.targets == 1, answers, 1 - answers)
    assert judged["wrong_bits"].tolist() == (said_right < 0.5).sum(dim=(0, 2)).tolist()
    torch.testing.assert_close(judged["cost_bits"].float(), -said_right.log2().sum(dim=(0, 2)))


def test_greater_sizes_are_measured_with_as_many_rows_as_are_asked_for(tiny_settings):
    settings = tiny_settings("--evaluation.long-memory-rows=16,40", "--evaluation.long-sizes=30")
    torch.manual_seed(0)
    cell = make_cell(settings)

    scores = evaluate(cell, settings)

    for size, rows in ((5, 16), (30, 40)):  # 5 is of every tiny run.
        expected = measure(with_memory_rows(cell, rows), settings.task, (size,), 2)["wrong_bits"]
        assert scores[f"wrong_bits_at_{size}"] == expected
    assert scores["wrong_bits"] == evaluate(cell, tiny_settings())["wrong_bits"]


@pytest.mark.parametrize(("enough", "num_judged"), [(0.0, 64), (4.0, 128), (100.0, 150)])
def test_a_greater_size_is_measured_until_it_cannot_be_enough(tiny_settings, monkeypatch, enough, num_judged):
    settings = tiny_settings("--evaluation.num-long-sequences=150", f"--evaluation.enough={enough}")
    cell = saying(settings, -1)  # So that each of some 5 set bits is wrong.
    judged = []
    monkeypatch.setattr(
        evaluation, "judge", lambda *given: judged.append(len(given[2].targets[0])) or judge(*given)
    )

    scores = evaluate(cell, settings)

    judged = judged[3:]  # Behind the sizes of training.
    assert sum(judged) == num_judged
    drawn = settings.task.draw(150, (5,), torch.Generator().manual_seed(2_000_005))
    assert scores["wrong_bits_at_5"] == pytest.approx(float(drawn.targets[:, :num_judged].sum() / num_judged))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_answers_that_are_no_finite_numbers_score_infinity(tiny_settings, number):
    """Also where a comparison with NaN, which is False, happens to be the bit that is due."""
    settings = tiny_settings()
    cell = make_cell(settings)
    with torch.no_grad():
        cell.output.bias[:] = number
    zeros = settings.task.draw(3, (2,), torch.Generator().manual_seed(0))
    zeros = zeros._replace(targets=torch.zeros_like(zeros.targets))

    judged = judge(cell, settings.task, zeros)

    assert all((values == math.inf).all() for values in judged.values())
    assert not is_solved(evaluate(cell, settings), settings.task)
