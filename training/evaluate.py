"""Evaluation: how often a model errs and what its predictions cost, at the sizes of training and beyond them.

A model that makes no mistake at the sizes it was trained on may still fail at greater ones, so both are
measured. Every evaluation of a run sees the same sequences, drawn by a generator of their own; `report.py` measures
a finished run on others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from training.config import Settings, size_text
from training.losses import Scores
from training.model import Cell, PlainCell, named_tensors, unroll, with_memory_rows
from training.tasks import Sequences, Size, Task

_SEED = 2_000_000
# Repeat copy has 100 sizes of training; these many of them, always the same, stand for all.
_MOST_SIZES = 20
# Numbers in the state of as many sequences as run side by side: 16 MiB, and as much again for the next state.
_MOST_STATE = 2**22
# Sequences of a greater size that are measured before it is asked whether the others need to be.
_AT_ONCE = 64
# Steps of which everything is held at once.
_MOST_STEPS = 256

Judged = dict[str, Tensor]
"""How a model did in each sequence of a batch: [B] under the name of each score of the task's loss."""


@torch.no_grad()
def measure(cell: Cell, task: Task, size: Size, num_sequences: int, seed: int = _SEED) -> Scores:
    """Means over random sequences of one size.

    Returns:
        What the task's loss scores: of bits `wrong_bits`, those that differ from the target when read at 0.5, and
        `cost_bits`, the cross-entropy in bits. And `optimal_bits`, the least possible cost. Each of a whole sequence.
    """
    sequences = task.draw(num_sequences, size, generator_for(size, seed))
    return means(judge(cell, task, sequences), task, sequences)


def generator_for(size: Size, seed: int) -> torch.Generator:
    """What draws the sequences of a size."""
    return torch.Generator().manual_seed(seed + sum(size))


def means(judged: Judged, task: Task, sequences: Sequences) -> Scores:
    """The scores of `measure`, of sequences that were judged."""
    optimal = task.optimal_cost(sequences)
    return {
        **{name: float(values.mean()) for name, values in judged.items()},
        "optimal_bits": 0.0 if optimal is None else float(optimal.mean()),
    }


@torch.no_grad()
def judge(cell: Cell, task: Task, sequences: Sequences) -> Judged:
    """Run a cell over sequences, as many side by side as its state has room for, and keep its answers alone.

    A sequence to which an answer is not a finite number scores infinity, whatever the comparisons make of it.
    """
    inputs, targets, mask = task.check(sequences, sequences.inputs.shape[1])
    num_rows = max(1, _MOST_STATE // _state_numbers(cell))
    parts = torch.split(inputs, num_rows, dim=1)
    answers = torch.cat([_answers(cell, part, len(targets)) for part in parts], dim=1)
    is_finite = answers.isfinite().all(dim=-1).all(dim=0)
    scores = task.loss.scores(answers, targets, mask)
    return {name: values.where(is_finite, math.inf) for name, values in scores.items()}


def _answers(cell: Cell, inputs: Tensor, num_answers: int) -> Tensor:
    """[T, B, I] to the logits [A, B, O] of the last A steps."""
    weight = cell.output.weight
    num_steps, batch_size, _ = inputs.shape
    answers = torch.empty(num_answers, batch_size, len(weight))
    first = num_steps - num_answers
    state: Any = cell.initial_state(batch_size)
    for start in range(0, num_steps, _MOST_STEPS):
        steps = inputs[start : start + _MOST_STEPS].to(weight.device)
        logits, state = unroll(cell, steps, state, is_compiled=weight.device.type == "cpu")
        due = logits[max(0, first - start) :]
        where = max(0, start - first)
        answers[where : where + len(due)] = due
    return answers


def _state_numbers(cell: Cell) -> int:
    """Numbers in the state of one sequence."""
    return sum(tensor.numel() for tensor in named_tensors(cell.initial_state(1)).values())


def evaluate(cell: Cell, settings: Settings) -> Scores:
    """Scores by name: over the sizes of training what `measure` gives and, where the best possible predictor pays
    something, `cost_over_optimal`; at each greater size what the task's goal is about, as `wrong_bits_at_120`.
    """
    task, evaluation = settings.task, settings.evaluation
    measured = [measure(cell, task, size, evaluation.num_sequences) for size in _sizes(task)]
    scores = {name: sum(each[name] for each in measured) / len(measured) for name in measured[0]}
    optimal = scores.pop("optimal_bits")
    if optimal:
        scores["cost_over_optimal"] = scores["cost_bits"] / optimal
    for size, rows in zip(settings.long_sizes, settings.long_memory_rows, strict=True):
        long_cell = (
            with_memory_rows(cell, rows) if rows is not None and not isinstance(cell, PlainCell) else cell
        )
        scores[f"{task.goal.measure}_at_{size_text(size)}"] = _long_score(long_cell, settings, size)
    return scores


def is_mastered(cell: Cell, settings: Settings, size: Size) -> bool:
    """Whether a model does well enough at a size for a curriculum to go further."""
    task, below = settings.task, settings.curriculum.mastered_below
    measured = measure(cell, task, size, settings.evaluation.num_sequences)
    if measured["optimal_bits"]:
        measured["cost_over_optimal"] = measured["cost_bits"] / measured["optimal_bits"]
    return measured[task.goal.measure] < (task.goal.below if below is None else below)


def _long_score(cell: Cell, settings: Settings, size: Size) -> float:
    """What the goal is about, at a size beyond training. Once so much is wrong that the run cannot end by it, whatever
    the sequences that are left would say, it is the mean over those measured."""
    task, evaluation = settings.task, settings.evaluation
    num_sequences = evaluation.num_long_sequences
    enough = math.inf if evaluation.enough is None else evaluation.enough
    sequences = task.draw(num_sequences, size, generator_for(size, _SEED))
    measured: list[Tensor] = []
    total_so_far = 0.0
    while sum(map(len, measured)) < num_sequences and total_so_far <= enough * num_sequences:
        first = len(measured) * _AT_ONCE
        part = sequences.part(slice(first, first + _AT_ONCE), sequences.inputs.device)
        measured.append(judge(cell, task, part)[task.goal.measure])
        total_so_far += float(measured[-1].sum())
    return float(torch.cat(measured).mean())


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
