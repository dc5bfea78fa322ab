"""Evaluation: how often a model errs and what its predictions cost, at the sizes of training and beyond them.

A model that makes no mistake at the sizes it was trained on may still fail at greater ones, so both are
measured. Every evaluation of a run sees the same sequences, drawn by a generator of their own; `report.py` measures
a finished run on others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from training.config import Settings, size_text
from training.model import Cell, unroll
from training.tasks import Size, Task

_SEED = 2_000_000
# Repeat copy has 100 sizes of training; these many of them, always the same, stand for all.
_MOST_SIZES = 20

Scores = dict[str, float]


@torch.no_grad()
def measure(cell: Cell, task: Task, size: Size, num_sequences: int, seed: int = _SEED) -> Scores:
    """Means over random sequences of one size.

    Returns:
        `wrong_bits`, the output bits, read at 0.5, that differ from the target; `cost_bits`, the cross-entropy in
        bits; and `optimal_bits`, the least possible cost. Each of a whole sequence.
    """
    generator = torch.Generator().manual_seed(seed + sum(size))
    sequences = task.draw(num_sequences, size, generator)
    device = cell.output.weight.device
    outputs, _ = unroll(cell, sequences.inputs.to(device))
    answers = outputs[-len(sequences.targets) :].cpu()
    cost = F.binary_cross_entropy_with_logits(answers, sequences.targets, reduction="sum")
    optimal = task.optimal_cost(sequences)
    return {
        "wrong_bits": float(((answers > 0) != sequences.targets.bool()).sum() / num_sequences),
        "cost_bits": float(cost / num_sequences / math.log(2)),
        "optimal_bits": 0.0 if optimal is None else float(optimal.mean()),
    }


def evaluate(cell: Cell, settings: Settings) -> Scores:
    """Scores by name: over the sizes of training `wrong_bits`, `cost_bits` and, where the best possible predictor pays
    something, `cost_over_optimal`; at each greater size what the task's goal is about, as `wrong_bits_at_120`.
    """
    task, evaluation = settings.task, settings.evaluation
    measured = [measure(cell, task, size, evaluation.num_sequences) for size in _sizes(task)]
    scores = {name: sum(each[name] for each in measured) / len(measured) for name in measured[0]}
    optimal = scores.pop("optimal_bits")
    if optimal:
        scores["cost_over_optimal"] = scores["cost_bits"] / optimal
    for size in settings.long_sizes:
        at_size = measure(cell, task, size, evaluation.num_long_sequences)
        scores[f"{task.goal.measure}_at_{size_text(size)}"] = at_size[task.goal.measure]
    return scores


def is_solved(scores: Scores, task: Task) -> bool:
    """Whether the model meets the task's goal at the sizes of training."""
    return scores[task.goal.measure] < task.goal.below


def total(scores: Scores, task: Task) -> float:
    """One number to choose a checkpoint by, the less the better: what the goal is about, over all sizes together."""
    return sum(value for name, value in scores.items() if name.startswith(task.goal.measure))


def _sizes(task: Task) -> list[Size]:
    sizes = task.sizes()
    if len(sizes) <= _MOST_SIZES:
        return sizes
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0))
    return [sizes[index] for index in order[:_MOST_SIZES].tolist()]
