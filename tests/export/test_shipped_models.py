"""The models in models/ do what docs/training.md says of them, run as the server runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.onnx_file import read_spec
from export.spec import initial_value
from training.tasks import Sequences, Size, Task
from training.tasks.associative_recall import AssociativeRecallTask
from training.tasks.copy import CopyTask
from training.tasks.dynamic_ngrams import DynamicNGramsTask
from training.tasks.priority_sort import PrioritySortTask
from training.tasks.repeat_copy import RepeatCopyTask

MODELS = Path(__file__).parents[2] / "models"


def drawn(task: Task, size: Size, num_sequences: int) -> Sequences:
    return task.draw(num_sequences, size, torch.Generator().manual_seed(2026))


def answers(sequences: Sequences, model: str) -> np.ndarray:
    """What a model says where an answer is due: [A, B, O] in (0, 1)."""
    path = MODELS / model / "1" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    spec = read_spec(onnx.load(path))
    batch_size = sequences.inputs.shape[1]
    state = {state.input_name: np.repeat(initial_value(state)[None], batch_size, 0) for state in spec.states}
    names = ["output", *(state.output_name for state in spec.states)]
    said = []
    for inputs in sequences.inputs.numpy():
        output, *after = session.run(names, {"input": inputs, **state})
        state = dict(zip(state, after, strict=True))
        said.append(output)
    return np.stack(said[-len(sequences.targets) :])


def wrong_bits(task: Task, size: Size, num_sequences: int, model: str = "") -> float:
    """In the mean of so many sequences, of the task's model or another."""
    sequences = drawn(task, size, num_sequences)
    wrong = (answers(sequences, model or task.name) > 0.5) != sequences.targets.numpy().astype(bool)
    return float(wrong.sum() / num_sequences)


def cost_bits(task: Task, size: Size, num_sequences: int) -> tuple[float, float]:
    """In the mean of so many sequences, and what the best possible predictor pays for the same."""
    sequences = drawn(task, size, num_sequences)
    targets, said = sequences.targets.numpy(), answers(sequences, task.name).clip(1e-7, 1 - 1e-7)
    cost = -np.log2(np.where(targets == 1, said, 1 - said)).sum() / num_sequences
    optimal = task.optimal_cost(sequences)
    return float(cost), 0.0 if optimal is None else float(optimal.mean())


@pytest.mark.parametrize("length", [1, 20, 100, 120])
def test_copy_makes_no_mistake_far_beyond_the_lengths_of_training(length: int) -> None:
    assert wrong_bits(CopyTask(), (length,), 50) == 0


@pytest.mark.parametrize(("length", "num_sequences"), [(1, 50), (20, 50), (1000, 8)])
def test_copy_over_more_rows_makes_no_mistake_fifty_times_beyond_the_lengths_of_training(
    length: int, num_sequences: int
) -> None:
    assert wrong_bits(CopyTask(), (length,), num_sequences, "copy-long") == 0


def test_the_baseline_copies_what_it_was_trained_on_and_no_more() -> None:
    assert wrong_bits(CopyTask(), (10,), 50, "copy-lstm") < 1
    assert wrong_bits(CopyTask(), (40,), 50, "copy-lstm") > 50


@pytest.mark.parametrize(("num_items", "most"), [(2, 0), (6, 0), (12, 0.1), (20, 1)])
def test_associative_recall_finds_items_in_lists_longer_than_any_of_training(
    num_items: int, most: float
) -> None:
    assert wrong_bits(AssociativeRecallTask(), (num_items,), 200) <= most


@pytest.mark.parametrize(("size", "most"), [((1, 1), 0), ((5, 5), 0), ((10, 10), 0), ((20, 10), 0.1)])
def test_repeat_copy_repeats_and_ends(size: Size, most: float) -> None:
    assert wrong_bits(RepeatCopyTask(), size, 200) <= most


def test_dynamic_ngrams_is_within_two_per_cent_of_the_best_possible_predictor() -> None:
    cost, optimal = cost_bits(DynamicNGramsTask(), (200,), 500)

    assert cost < 1.02 * optimal


def test_priority_sort_pays_less_than_ten_bits() -> None:
    assert cost_bits(PrioritySortTask(), (20, 16), 500)[0] < 10
