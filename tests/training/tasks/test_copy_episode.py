"""The copy episode: its layout."""

from __future__ import annotations

import torch

from training.tasks.copy_episode import CopyEpisodeTask


def test_each_copy_is_its_vectors_a_delimiter_and_the_same_vectors_due():
    task = CopyEpisodeTask(num_bits=4)
    length, copies = 3, 5

    inputs, targets, mask = task.draw(2, (length, copies), torch.Generator().manual_seed(0))

    assert mask is not None
    for copy in range(copies):
        first = copy * (2 * length + 1)
        delimiter = first + length
        end = first + 2 * length + 1
        vectors = inputs[first:delimiter, :, :4]
        assert (inputs[first:delimiter, :, 4] == 0).all()
        assert (inputs[delimiter] == torch.tensor([0.0, 0, 0, 0, 1])).all()
        assert (inputs[delimiter + 1 : end] == 0).all()
        assert torch.equal(targets[delimiter + 1 : end], vectors)
        assert mask[delimiter + 1 : end].all()
        assert not mask[first : delimiter + 1].any()
        assert vectors.any()
    assert len(inputs) == end


def test_vectors_can_be_of_a_pattern():
    sequences = CopyEpisodeTask().draw_patterned("zeros", 3, (2, 4), torch.Generator())

    assert not sequences.targets.any()
    assert sequences.inputs.sum() == 3 * 4


def test_some_sequences_of_training_have_few_ones():
    task = CopyEpisodeTask(sparse_share=0.5)

    inputs, targets, mask = task.draw_for_training(400, (5, 4), torch.Generator().manual_seed(0))

    assert mask is not None
    ones = targets.sum(dim=(0, 2)) / mask[:, 0].sum() / 8
    assert 0.3 < (ones < 0.4).float().mean() < 0.6
    assert (ones < 0.05).any()
    assert torch.equal(inputs[..., :8].sum(dim=0), targets.sum(dim=0))
