"""What outputs stand for, held to slow readings of the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from training.losses import LOSSES, mean

BITS, CLASSES, NUMBERS = LOSSES["binary-cross-entropy"], LOSSES["cross-entropy"], LOSSES["mean-squared-error"]


def means(scores):
    return {name: float(values.mean()) for name, values in scores.items()}


def test_bits_cost_their_cross_entropy_and_are_wrong_on_the_other_side_of_one_half():
    outputs, targets = torch.randn(3, 2, 4), torch.randint(0, 2, (3, 2, 4)).float()
    mask = torch.tensor([[True, False], [True, True], [False, True]])

    scores = means(BITS.scores(outputs, targets, mask))

    cost, wrong = 0.0, 0
    for answer in range(3):
        for row in range(2):
            for bit in range(4) if mask[answer, row] else ():
                chance = 1 / (1 + math.exp(-outputs[answer, row, bit]))
                target = float(targets[answer, row, bit])
                cost -= math.log2(chance if target else 1 - chance)
                wrong += (chance > 0.5) != bool(target)
    assert scores["cost_bits"] == pytest.approx(cost / 2, rel=1e-5)
    assert scores["wrong_bits"] == wrong / 2


def test_classes_cost_minus_the_log_of_their_probability_and_are_wrong_where_another_is_likelier():
    outputs, targets = torch.randn(3, 2, 5), torch.randint(0, 5, (3, 2))
    mask = torch.tensor([[True, False], [True, True], [False, True]])

    scores = means(CLASSES.scores(outputs, targets, mask))

    cost, wrong = 0.0, 0
    for answer in range(3):
        for row in range(2):
            if mask[answer, row]:
                chances = [math.exp(output) for output in outputs[answer, row]]
                cost -= math.log2(chances[targets[answer, row]] / sum(chances))
                wrong += max(chances) != chances[targets[answer, row]]
    assert scores["cost_bits"] == pytest.approx(cost / 2, rel=1e-5)
    assert scores["wrong_symbols"] == wrong / 2
    assert scores["error_rate"] == wrong / 4  # Each sequence has two answers.


def test_numbers_cost_the_mean_of_their_squared_differences():
    outputs, targets = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 2.0]], [[3.0, math.inf]]])

    assert means(NUMBERS.scores(outputs, targets, torch.tensor([[True], [False]]))) == {"squared_error": 2.5}


@pytest.mark.parametrize(
    ("loss", "activated"),
    [
        (BITS, [0.5, 1 / (1 + math.exp(-2))]),
        (CLASSES, [1 / (1 + math.exp(2)), math.exp(2) / (1 + math.exp(2))]),
        (NUMBERS, [0.0, 2.0]),
    ],
)
def test_what_is_served_are_probabilities_of_bits_and_classes_and_numbers_as_they_are(loss, activated):
    assert_close(loss.activate(torch.tensor([0.0, 2.0])), torch.tensor(activated))


def test_the_mean_of_a_batch_is_the_mean_of_its_parts_when_both_divide_by_the_same_number():
    values, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.5
    num_counted = float(mask.sum()) / 2

    parts = [mean(values[:, rows], mask[:, rows], num_counted) for rows in (slice(3), slice(3, 6))]

    assert_close(sum(parts) / 2, values[mask].mean())


@pytest.mark.parametrize(
    ("loss", "targets", "said"),
    [
        (BITS, torch.full((2, 3, 4), 1.5), "must be from 0 to 1, not 1.5 to 1.5"),
        (BITS, torch.full((2, 3, 4), float("nan")), "must be from 0 to 1"),
        (BITS, torch.zeros(2, 3, 5), r"floats \[answers, batch, 4\], not float32 \[2, 3, 5\]"),
        (CLASSES, torch.zeros(2, 3), r"int64 \[answers, batch\], not float32"),
        (CLASSES, torch.full((2, 3), 4), "from 0 to 3, not 4 to 4; leave out by the mask"),
        (CLASSES, torch.full((2, 3), -100), "from 0 to 3"),
        (NUMBERS, torch.full((2, 3, 4), float("inf")), "must be finite"),
        (NUMBERS, torch.zeros(2, 3, 4, dtype=torch.long), "must be floats"),
    ],
)
def test_targets_that_a_loss_cannot_compare_are_refused(loss, targets, said):
    with pytest.raises(ValueError, match=said):
        loss.check(targets, 4)
