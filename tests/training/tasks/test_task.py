"""What holds for every task."""

from __future__ import annotations

import pytest
import torch

from training.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_sequences_have_the_sizes_that_the_task_says(name):
    task = TASKS[name]()
    size = task.draw_size(torch.Generator().manual_seed(0))

    inputs, targets = task.draw(3, size, torch.Generator().manual_seed(0))

    assert len(size) == len(task.size_names)
    assert size in task.sizes()
    assert inputs.shape[1:] == (3, task.input_size)
    assert targets.shape[1:] == (3, task.output_size)
    assert len(targets) <= len(inputs)
    assert inputs.dtype == targets.dtype == torch.float32
    assert ((targets == 0) | (targets == 1)).all()
    assert task.input_description
    assert task.output_description


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_draws_the_same_sequences_and_another_seed_others(name):
    task = TASKS[name]()
    size = max(task.sizes())

    first, second, other = (task.draw(4, size, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))

    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.inputs, other.inputs)
