"""Evaluation counts what it says it counts."""

from __future__ import annotations

import torch

from training.config import make_cell
from training.evaluate import evaluate, is_solved, wrong_bits


def test_a_model_that_says_nothing_gets_every_set_bit_wrong(tiny_settings):
    settings = tiny_settings()
    cell = make_cell(settings)
    torch.nn.init.zeros_(cell.output.weight)
    torch.nn.init.constant_(cell.output.bias, -1)
    drawn = settings.task.draw(10, 4, torch.Generator().manual_seed(9 + 4))

    assert wrong_bits(cell, settings.task, 4, 10, seed=9) * 10 == drawn.targets.sum()


def test_scores_name_each_length_and_are_the_same_each_time(tiny_settings):
    settings = tiny_settings()
    cell = make_cell(settings)

    scores = evaluate(cell, settings)

    assert list(scores) == ["wrong_bits", "wrong_bits_at_5"]
    assert scores == evaluate(cell, settings)
    lengths = [wrong_bits(cell, settings.task, length, 2) for length in (1, 2, 3)]
    assert scores["wrong_bits"] == sum(lengths) / 3


def test_a_task_is_solved_below_a_tenth_of_a_wrong_bit():
    assert is_solved({"wrong_bits": 0.09, "wrong_bits_at_120": 400})
    assert not is_solved({"wrong_bits": 0.1})
