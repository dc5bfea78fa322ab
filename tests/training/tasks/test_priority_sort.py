"""The layout of the priority sort task against Python's own sorting."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from training.tasks.priority_sort import PrioritySortTask


def test_the_vectors_of_highest_priority_are_due_highest_first():
    sequences = PrioritySortTask().draw(10, (20, 16), torch.Generator().manual_seed(0))

    assert sequences.inputs.shape == (36, 10, 9)
    for row in range(10):
        heard = sequences.inputs[:20, row].tolist()
        by_priority = sorted(heard, key=lambda step: step[8], reverse=True)
        assert sequences.targets[:, row].tolist() == [step[:8] for step in by_priority[:16]]
        assert (sequences.inputs[20:, row] == 0).all()


def test_priorities_are_even_between_minus_1_and_1():
    priorities = PrioritySortTask().draw(500, (20, 16), torch.Generator().manual_seed(0)).inputs[:20, :, 8]

    assert -1 <= priorities.min() < -0.99
    assert 0.99 < priorities.max() <= 1
    assert priorities.mean().item() == pytest.approx(0, abs=0.03)
    assert priorities.var().item() == pytest.approx(1 / 3, abs=0.02)


def test_the_paper_sorts_20_vectors_of_8_bits_into_16():
    task = PrioritySortTask()

    assert (task.num_bits, task.sizes()) == (8, [(20, 16)])


def test_more_sorted_vectors_than_there_are_is_refused():
    with pytest.raises(ValidationError, match="num_sorted 21 is greater than num_vectors 20"):
        PrioritySortTask(num_sorted=21)
