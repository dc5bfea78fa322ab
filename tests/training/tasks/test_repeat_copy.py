"""The layout of the repeat copy task against a loop that follows the paper's words."""

from __future__ import annotations

import statistics

import pytest
import torch
from pydantic import ValidationError

from training.tasks.repeat_copy import RepeatCopyTask


@pytest.mark.parametrize(("length", "repeats"), [(1, 1), (3, 4), (10, 10), (2, 20)])
def test_the_vectors_are_due_as_often_as_the_number_says_and_then_the_end_marker(length, repeats):
    sequences = RepeatCopyTask().draw(5, (length, repeats), torch.Generator().manual_seed(0))

    counts = range(1, 11)
    number = (repeats - statistics.mean(counts)) / statistics.pstdev(counts)
    for row in range(5):
        inputs, targets = sequences.inputs[:, row].tolist(), sequences.targets[:, row].tolist()
        vectors = [step[:8] for step in inputs[:length]]
        assert all(set(vector) <= {0, 1} for vector in vectors)
        expected = [[*vector, 0] for vector in vectors]
        expected.append([0] * 8 + [pytest.approx(number, abs=1e-6)])
        expected += [[0] * 9] * (repeats * length + 1)
        assert inputs == expected
        assert targets == [[*vector, 0] for vector in vectors * repeats] + [[0] * 8 + [1]]


def test_in_training_alone_more_vectors_can_be_blank():
    def is_blank(draw):
        sequences = draw(1000, (4, 3), torch.Generator().manual_seed(0))
        vectors = sequences.inputs[:4, :, :8]
        assert sequences.targets[:-1, :, :8].equal(vectors.repeat(3, 1, 1))
        return (vectors.sum(dim=2) == 0).float().mean().item()

    task = RepeatCopyTask(blank_share=0.25)
    assert is_blank(task.draw_for_training) == pytest.approx(0.25, abs=0.03)
    assert is_blank(task.draw) < 0.01
    assert is_blank(RepeatCopyTask().draw_for_training) < 0.01


def test_the_number_has_mean_0_and_variance_1_over_training():
    task = RepeatCopyTask()
    generator = torch.Generator().manual_seed(0)

    numbers = torch.stack([task.draw(1, size, generator).inputs[size[0], 0, 8] for size in task.sizes()])

    assert numbers.mean().item() == pytest.approx(0, abs=1e-6)
    assert numbers.var(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_the_paper_trains_on_lengths_and_repeats_of_1_to_10():
    assert RepeatCopyTask().sizes() == [
        (length, repeats) for length in range(1, 11) for repeats in range(1, 11)
    ]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_length": 9, "max_length": 3}, "min_length 9 is greater than max_length 3"),
        ({"min_repeats": 9, "max_repeats": 3}, "min_repeats 9 is greater than max_repeats 3"),
        ({"min_repeats": 3, "max_repeats": 3}, "nothing to normalise by"),
    ],
)
def test_bounds_that_cannot_work_are_refused(bounds, message):
    with pytest.raises(ValidationError, match=message):
        RepeatCopyTask(**bounds)
