"""What holds for every task."""

from __future__ import annotations

import pytest
import torch

from training.errors import TaskError
from training.tasks import TASKS, Sequences
from training.tasks.copy import CopyTask

GENERATED = [name for name in TASKS if name != "dataset"]


@pytest.mark.parametrize("name", GENERATED)
def test_sequences_have_the_sizes_that_the_task_says(name):
    task = TASKS[name]()
    size = task.draw_size(torch.Generator().manual_seed(0))

    inputs, targets, _ = task.draw(3, size, torch.Generator().manual_seed(0))

    assert len(size) == len(task.size_names)
    assert size in task.sizes()
    assert inputs.shape[1:] == (3, task.input_size)
    assert len(targets) <= len(inputs)
    assert inputs.dtype == torch.float32
    assert ((inputs == 0) | (inputs == 1)).all() or name in ("repeat-copy", "priority-sort")
    task.loss.check(targets, task.output_size)
    assert task.input_description
    assert task.output_description


@pytest.mark.parametrize("name", GENERATED)
def test_the_same_seed_draws_the_same_sequences_and_another_seed_others(name):
    task = TASKS[name]()
    size = max(task.sizes())

    first, second, other = (task.draw(4, size, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))

    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (
            Sequences(torch.zeros(3, 5, 9), torch.zeros(2, 3, 8)),
            r"inputs must be \[steps, 3, 9\], not \[3, 5, 9\]",
        ),
        (Sequences(torch.zeros(5, 3, 8), torch.zeros(2, 3, 8)), r"inputs must be \[steps, 3, 9\]"),
        (Sequences(torch.zeros(5, 3, 9), torch.zeros(6, 3, 8)), "with 1 to 5 answers"),
        (Sequences(torch.zeros(5, 3, 9), torch.zeros(3, 2, 8)), r"targets must be \[answers, 3, ...\]"),
        (Sequences(torch.zeros(5, 3, 9), torch.full((2, 3, 8), 2.0)), "from 0 to 1, not 2 to 2"),
        (
            Sequences(torch.zeros(5, 3, 9), torch.zeros(2, 3, 8), torch.ones(2, 3)),
            r"the mask must be bool \[2, 3\], not torch.float32",
        ),
        (
            Sequences(torch.zeros(5, 3, 9), torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)),
            "leaves out every answer",
        ),
    ],
)
def test_sequences_that_are_not_what_the_task_says_are_refused_with_what_is_wrong_about_them(drawn, said):
    with pytest.raises(TaskError, match=said):
        CopyTask().check(drawn, 3)


def test_sequences_of_unequal_length_are_padded_behind_their_end_and_nothing_there_counts():
    task, sizes = CopyTask(num_bits=2), [(3,), (1,), (3,), (2,)]

    inputs, targets, mask = task.check(task.draw_mixed(sizes, torch.Generator().manual_seed(0)), 4)

    assert inputs.shape == (7, 4, 3)
    assert mask.sum(dim=0).tolist() == [3, 1, 3, 2]
    for row, (length,) in enumerate(sizes):
        heard = inputs[:length, row, :2]
        assert inputs[length, row].tolist() == [0, 0, 1]
        assert (inputs[length + 1 :, row] == 0).all()
        assert mask[length + 1 : 2 * length + 1, row].all()
        assert torch.equal(targets[length + 1 : 2 * length + 1, row], heard)


def test_sequences_of_equal_length_need_neither_padding_nor_a_mask():
    inputs, _, mask = CopyTask().draw_mixed([(3,)] * 4, torch.Generator().manual_seed(0))

    assert inputs.shape == (7, 4, 9)
    assert mask is None
