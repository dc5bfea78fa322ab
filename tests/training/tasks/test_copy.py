"""The layout of the copy task, which clients rely on."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from training.tasks.copy import CopyTask


def test_a_sequence_is_the_vectors_the_delimiter_and_silence_while_the_vectors_are_due():
    sequences = CopyTask(num_bits=8).draw(3, (5,), torch.Generator().manual_seed(0))

    assert sequences.inputs.shape == (11, 3, 9)
    assert sequences.targets.shape == (5, 3, 8)
    assert torch.equal(sequences.inputs[:5, :, :8], sequences.targets)
    assert (sequences.inputs[:5, :, 8] == 0).all()
    assert torch.equal(sequences.inputs[5], torch.tensor([0.0] * 8 + [1.0]).expand(3, 9))
    assert (sequences.inputs[6:] == 0).all()
    assert set(sequences.targets.unique().tolist()) == {0.0, 1.0}


def test_the_paper_trains_on_lengths_1_to_20_and_8_bits():
    task = CopyTask()

    assert (task.num_bits, task.sizes()) == (8, [(length,) for length in range(1, 21)])


def test_every_length_of_training_is_drawn_and_no_other():
    generator = torch.Generator().manual_seed(0)
    task = CopyTask(min_length=2, max_length=5)

    assert {task.draw_size(generator) for _ in range(200)} == {(2,), (3,), (4,), (5,)}


def test_a_shortest_length_above_the_longest_is_refused():
    with pytest.raises(ValidationError, match="min_length 9 is greater than max_length 3"):
        CopyTask(min_length=9, max_length=3)
