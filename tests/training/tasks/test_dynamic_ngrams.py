"""The law of dynamic N-grams, and the optimal estimator against a dictionary of counts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from training.tasks.dynamic_ngrams import DynamicNGramsTask


def draw(task: DynamicNGramsTask, batch_size: int, num_bits: int):
    return task.draw(batch_size, (num_bits,), torch.Generator().manual_seed(0))


def test_each_step_shows_a_bit_and_the_next_one_is_due():
    sequences = draw(DynamicNGramsTask(), 4, 200)

    assert sequences.inputs.shape == sequences.targets.shape == (199, 4, 1)
    assert torch.equal(sequences.inputs[1:], sequences.targets[:-1])
    assert set(sequences.inputs.unique().tolist()) == {0.0, 1.0}


def test_the_paper_has_200_bits_and_contexts_of_5():
    task = DynamicNGramsTask()

    assert (task.order, task.sizes()) == (6, [(200,)])


@pytest.mark.parametrize("order", [1, 3, 6])
def test_the_optimal_cost_is_what_counting_by_context_pays(order):
    task = DynamicNGramsTask(order=order, num_bits=60)
    sequences = draw(task, 3, 60)

    for row in range(3):
        bits = [int(sequences.inputs[0, row, 0]), *map(int, sequences.targets[:, row, 0].tolist())]
        counts, cost = Counter(), 0.0
        for step in range(len(bits)):
            if step < order - 1:
                chance = 0.5  # No context yet: the bit is even.
            else:
                context = tuple(bits[step - order + 1 : step])
                seen = counts[context, bits[step]], counts[context, 0] + counts[context, 1]
                chance = (seen[0] + 0.5) / (seen[1] + 1)
                counts[context, bits[step]] += 1
            cost -= math.log2(chance) if step > 0 else 0  # The first bit is never due.
        assert task.optimal_cost(sequences)[row].item() == pytest.approx(cost, rel=1e-6)


def test_how_often_a_1_follows_a_context_is_beta_distributed():
    """With order 1 there is one context, so that a sequence's share of ones is its only chance. Beta(1/2, 1/2) has
    mean 1/2 and variance 1/8, and a third of its mass below sin²(π/6) = 1/4."""
    sequences = draw(DynamicNGramsTask(order=1, num_bits=2000), 2000, 2000)

    share = sequences.targets.mean(dim=(0, 2))

    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(0.125, abs=0.01)
    assert (share < 0.25).float().mean().item() == pytest.approx(1 / 3, abs=0.04)


def test_a_bit_depends_on_its_context_alone():
    """In one long sequence each context goes on with its own frequency, the same in both halves."""
    [bits] = draw(DynamicNGramsTask(order=3, num_bits=40_000), 1, 40_000).targets.squeeze(-1).T.tolist()

    halves = []
    for half in (bits[:20_000], bits[20_000:]):
        ones = Counter()
        for first, second, third in zip(half, half[1:], half[2:], strict=False):
            ones[first, second, "all"] += 1
            ones[first, second, "ones"] += third
        halves.append(ones)
    for context in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if all(half[*context, "all"] > 1000 for half in halves):
            shares = [half[*context, "ones"] / half[*context, "all"] for half in halves]
            assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_the_first_bits_are_even():
    sequences = draw(DynamicNGramsTask(), 4000, 200)

    assert sequences.inputs[:5].mean(dim=(1, 2)).tolist() == pytest.approx([0.5] * 5, abs=0.03)


def test_a_sequence_shorter_than_a_context_is_refused():
    with pytest.raises(ValidationError, match="num_bits 6 must be greater than order 6"):
        DynamicNGramsTask(num_bits=6)
