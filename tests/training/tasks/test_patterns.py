"""Patterned vectors are what their names say, and every task of the paper can be heard with them."""

from __future__ import annotations

import pytest
import torch

from training.tasks import PATTERNS, TASKS
from training.tasks.associative_recall import AssociativeRecallTask
from training.tasks.copy import CopyTask
from training.tasks.dynamic_ngrams import DynamicNGramsTask
from training.tasks.patterns import patterned_bits

WITHOUT_VECTORS = ("dataset", "formal-language", "graph-traversal", "shortest-path")
GENERATED = [name for name in TASKS if name not in WITHOUT_VECTORS]


def drawn(pattern, num_vectors=12, batch_size=20, num_bits=8):
    return patterned_bits(
        pattern, num_vectors, batch_size, num_bits, generator=torch.Generator().manual_seed(0)
    )


def test_zeros_are_zeros():
    assert (drawn("zeros") == 0).all()


def test_equal_vectors_are_equal_within_a_sequence_and_differ_between_sequences():
    vectors = drawn("equal")

    assert (vectors == vectors[0]).all()
    assert len(vectors[0].unique(dim=0)) > 10


def test_one_bit_of_a_sequence_is_set_anywhere():
    vectors = drawn("one-bit", batch_size=2000)

    assert (vectors.sum(dim=(0, 2)) == 1).all()
    assert (vectors.sum(dim=1) > 0).all()


def test_periodic_vectors_come_again_after_two_to_five():
    vectors = drawn("periodic", batch_size=200)

    periods = [
        next(p for p in range(1, 12) if torch.equal(vectors[p:, row], vectors[:-p, row]))
        for row in range(200)
    ]
    assert set(periods) == {2, 3, 4, 5}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", GENERATED)
def test_every_task_is_heard_with_every_pattern_in_its_own_layout(name, pattern):
    task = TASKS[name]()
    size = max(task.sizes())

    patterned = task.draw_patterned(pattern, 3, size, torch.Generator().manual_seed(0))

    random = task.draw(3, size, torch.Generator().manual_seed(0))
    assert patterned.inputs.shape == random.inputs.shape
    assert patterned.targets.shape == random.targets.shape
    assert ((patterned.targets == 0) | (patterned.targets == 1)).all()


def test_a_copy_of_a_pattern_is_the_pattern():
    inputs, targets, _ = CopyTask().draw_patterned("periodic", 4, (9,), torch.Generator().manual_seed(3))

    assert torch.equal(targets, inputs[:9, :, :8])
    assert (inputs[9, :, 8] == 1).all()
    assert (inputs[10:] == 0).all()


def test_bits_of_a_pattern_are_predicted_one_by_one():
    inputs, targets, _ = DynamicNGramsTask().draw_patterned(
        "one-bit", 4, (50,), torch.Generator().manual_seed(3)
    )

    assert torch.equal(inputs[1:], targets[:-1])
    assert (torch.cat([inputs[:1], targets]).sum(dim=0) == 1).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_items", [2, 6, 30])
def test_what_is_recalled_from_a_pattern_follows_every_item_like_the_query(pattern, num_items):
    inputs, targets, _ = AssociativeRecallTask().draw_patterned(
        pattern, 10, (num_items,), torch.Generator().manual_seed(0)
    )

    items = inputs[: 4 * num_items].view(num_items, 4, 10, 8)[:, 1:, :, :6]
    query = inputs[4 * num_items + 1 : 4 * num_items + 4, :, :6]
    for row in range(10):
        followers = [
            items[at + 1, :, row]
            for at in range(num_items - 1)
            if torch.equal(items[at, :, row], query[:, row])
        ]
        assert followers
        assert all(torch.equal(follower, targets[:, row]) for follower in followers)


def test_items_of_one_bit_each_differ_and_there_are_only_so_many():
    task = AssociativeRecallTask()

    inputs, _, _ = task.draw_patterned("one-bit", 2, (216,), torch.Generator().manual_seed(0))

    items = inputs[: 4 * 216].view(216, 4, 2, 8)[:, 1:, :, :6]
    assert (items.sum(dim=-1) == 1).all()
    assert len(items[:, :, 0].flatten(1).unique(dim=0)) == 216
    assert task.draw_patterned("one-bit", 2, (217,), torch.Generator()) is None
