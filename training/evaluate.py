"""Evaluation: wrong bits in a sequence, at the lengths of training and beyond them.

A model that makes no mistake at the lengths it was trained on may still fail at greater ones, so both are
measured. Every evaluation of a run sees the same sequences, drawn by a generator of their own.
"""

from __future__ import annotations

import torch

from training.config import Settings
from training.model import NTMCell, unroll
from training.tasks import CopyTask

_SEED = 2_000_000


@torch.no_grad()
def wrong_bits(cell: NTMCell, task: CopyTask, length: int, num_sequences: int, seed: int = _SEED) -> float:
    """Mean number of output bits, read at 0.5, that differ from the target, in a sequence of this length."""
    generator = torch.Generator().manual_seed(seed + length)
    sequences = task.draw(num_sequences, length, generator)
    outputs, _ = unroll(cell, sequences.inputs)
    said = outputs[-len(sequences.targets) :] > 0
    return float((said != sequences.targets.bool()).sum() / num_sequences)


def evaluate(cell: NTMCell, settings: Settings) -> dict[str, float]:
    """Scores by name: `wrong_bits`, the mean over the lengths of training, and `wrong_bits_at_120` and so on."""
    task, evaluation = settings.task, settings.evaluation
    lengths = range(task.min_length, task.max_length + 1)
    trained = [wrong_bits(cell, task, length, evaluation.num_sequences) for length in lengths]
    scores = {"wrong_bits": sum(trained) / len(trained)}
    for length in evaluation.long_lengths:
        scores[f"wrong_bits_at_{length}"] = wrong_bits(cell, task, length, evaluation.num_long_sequences)
    return scores


def is_solved(scores: dict[str, float]) -> bool:
    """Whether the model hardly errs at the lengths of training: fewer than 0.1 wrong bits in a sequence."""
    return scores["wrong_bits"] < 0.1


def total(scores: dict[str, float]) -> float:
    """One number to choose a checkpoint by, the less the better: all wrong bits together."""
    return sum(scores.values())
