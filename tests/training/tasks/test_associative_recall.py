"""The layout of the associative recall task, taken apart step by step."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from training.tasks.associative_recall import AssociativeRecallTask

DELIMITER, QUERY, SILENCE = [0] * 6 + [1, 0], [0] * 6 + [0, 1], [0] * 8


@pytest.mark.parametrize("num_items", [2, 6, 20])
def test_items_are_listed_one_is_asked_for_and_the_one_after_it_is_due(num_items):
    sequences = AssociativeRecallTask().draw(8, (num_items,), torch.Generator().manual_seed(0))

    for row in range(8):
        steps, targets = sequences.inputs[:, row].tolist(), sequences.targets[:, row].tolist()
        items = []
        for _ in range(num_items):
            assert steps.pop(0) == DELIMITER
            items.append([steps.pop(0) for _ in range(3)])
        assert all(vector[6:] == [0, 0] and set(vector) <= {0, 1} for item in items for vector in item)
        assert steps.pop(0) == QUERY
        asked = [steps.pop(0) for _ in range(3)]
        assert steps.pop(0) == QUERY
        assert steps == [SILENCE] * 3
        assert asked in items[:-1]
        assert [[*target, 0, 0] for target in targets] == items[items.index(asked) + 1]


def test_every_item_but_the_last_is_asked_for():
    sequences = AssociativeRecallTask().draw(300, (4,), torch.Generator().manual_seed(0))
    items = sequences.inputs[:16].reshape(4, 4, 300, 8)[:, 1:]

    asked = sequences.inputs[17:20]
    found = (items == asked).all(dim=-1).all(dim=1)  # [items, rows]

    assert (found.sum(dim=0) == 1).all()
    counts = found.sum(dim=1).tolist()
    assert counts[3] == 0
    assert all(70 < count < 130 for count in counts[:3])


def test_the_paper_trains_on_2_to_6_items_of_three_6_bit_vectors():
    task = AssociativeRecallTask()

    assert (task.num_bits, task.vectors_per_item) == (6, 3)
    assert task.sizes() == [(2,), (3,), (4,), (5,), (6,)]


def test_fewest_items_above_the_most_and_a_single_item_are_refused():
    with pytest.raises(ValidationError, match="min_items 7 is greater than max_items 3"):
        AssociativeRecallTask(min_items=7, max_items=3)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        AssociativeRecallTask(min_items=1)
