"""How well the models in models/ do, with intervals: each file as ONNX Runtime runs it, on sequences it never saw.

    python -m benchmarks.shipped_models

The mean of a few thousand sequences says little without its error: the least possible cost of one sequence of n-grams
alone has a deviation of some 35 bits. So every mean has an interval of 95 %, the share of sequences with a mistake has
Wilson's, and where the best possible predictor pays something, the excess is taken sequence by sequence, in which what
both pay cancels. The result goes to `results/shipped_models.json`; docs/training.md quotes it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measuring import machine
from export.onnx_file import read_spec
from export.spec import initial_value
from training.config import parse_sizes, size_text
from training.report import interval
from training.tasks import Sequences, Size, Task
from training.tasks.associative_recall import AssociativeRecallTask
from training.tasks.copy import CopyTask
from training.tasks.dynamic_ngrams import DynamicNGramsTask
from training.tasks.priority_sort import PrioritySortTask
from training.tasks.repeat_copy import RepeatCopyTask

MODELS = Path(__file__).parents[1] / "models"
RESULT = Path(__file__).parent / "results" / "shipped_models.json"
_SEED = 4_000_000  # No seed of training, of its evaluations or of `python -m training evaluate`.
_AT_ONCE = 250
_NORMAL_95 = 1.96


class Model(NamedTuple):
    """A shipped model, and at which sizes it is measured."""

    name: str
    task: Task
    sizes: list[Size]


_WITHIN_AND_BEYOND = [
    (1, 1),
    (5, 5),
    (10, 10),
    (12, 10),
    (15, 10),
    (20, 10),
    (10, 11),
    (10, 12),
    (10, 15),
    (10, 20),
]
SHIPPED = [
    Model("copy", CopyTask(), [(n,) for n in (1, 10, 20, 40, 80, 120, 126)]),
    Model("repeat-copy", RepeatCopyTask(), [*_WITHIN_AND_BEYOND]),
    Model("associative-recall", AssociativeRecallTask(), [(n,) for n in (2, 4, 6, 8, 10, 12, 15, 20)]),
    Model("dynamic-ngrams", DynamicNGramsTask(), [(200,)]),
    Model("priority-sort", PrioritySortTask(), [(20, 16)]),
    Model("copy-lstm", CopyTask(), [(n,) for n in (1, 5, 10, 15, 20, 40, 80, 120)]),
]


def measure(model: Model, size: Size, num_sequences: int) -> dict[str, Any]:
    """Wrong bits and cost of a sequence, each with what its mean may be off by, and how many have a mistake."""
    generator = torch.Generator().manual_seed(_SEED + sum(size))
    wrong, cost, least = [], [], []
    for first in range(0, num_sequences, _AT_ONCE):
        sequences = model.task.draw(min(_AT_ONCE, num_sequences - first), size, generator)
        probability = _answers(model.name, sequences).clamp(1e-7, 1 - 1e-7)
        targets = sequences.targets.double()
        wrong.append(((probability > 0.5) != targets.bool()).sum(dim=(0, 2)).double())
        of_bits = targets * probability.log2() + (1 - targets) * (1 - probability).log2()
        cost.append(-of_bits.sum(dim=(0, 2)))
        optimal = model.task.optimal_cost(sequences)
        least.append(torch.zeros_like(cost[-1]) if optimal is None else optimal)
    wrong_bits, cost_bits, least_bits = torch.cat(wrong), torch.cat(cost), torch.cat(least)
    num_wrong = int((wrong_bits > 0).sum())
    measured = {
        "size": size_text(size),
        "num_sequences": num_sequences,
        "wrong_bits": _mean(wrong_bits),
        "wrong_sequences": num_wrong,
        "wrong_sequences_share_95": interval(num_wrong, num_sequences),
        "cost_bits": _mean(cost_bits),
    }
    if bool((least_bits > 0).any()):
        measured |= {"least_bits": _mean(least_bits), "excess_bits": _mean(cost_bits - least_bits)}
    return measured


def _answers(name: str, sequences: Sequences) -> Tensor:
    """[A, B, O] in double precision, what the served file says where an answer is due."""
    path = MODELS / name / "1" / "model.onnx"
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    spec = read_spec(onnx.load(path))
    batch_size = sequences.inputs.shape[1]
    state = {part.input_name: np.repeat(initial_value(part)[None], batch_size, 0) for part in spec.states}
    names = [spec.outputs[0].name, *(part.output_name for part in spec.states)]
    first = len(sequences.inputs) - len(sequences.targets)
    said = []
    for step, inputs in enumerate(sequences.inputs.numpy()):
        output, *after = session.run(names, {spec.inputs[0].name: inputs, **state})
        state = dict(zip(state, after, strict=True))
        if step >= first:
            said.append(output)
    return torch.from_numpy(np.stack(said)).double()


def _mean(values: Tensor) -> dict[str, float]:
    """And what lies within it and the mean of all sequences there are, in 95 cases of 100."""
    return {"mean": float(values.mean()), "within": _NORMAL_95 * float(values.std()) / math.sqrt(len(values))}


def _shown(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['within']:.3f}"


def main() -> int:
    """Measure all, show it and write it down; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shipped_models", description=__doc__)
    parser.add_argument("--num-sequences", type=int, default=4000, help="of each size (4000)")
    parser.add_argument("--models", nargs="*", default=[model.name for model in SHIPPED])
    parser.add_argument(
        "--sizes", nargs="*", help="such as 126 or 20x10; default: those that are listed here"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for model in SHIPPED:
        if model.name not in options.models:
            continue
        sizes = parse_sizes(options.sizes, model.task, "--sizes") if options.sizes else model.sizes
        rows = [measure(model, size, options.num_sequences) for size in sizes]
        found[model.name] = rows
        shown = Table(title=f"models/{model.name}/1, {options.num_sequences} sequences of each size")
        with_least = "excess_bits" in rows[0]
        names = ["size", "wrong bits", "with a mistake", "cost in bits"] + ["above the least"] * with_least
        for column in names:
            shown.add_column(column, justify="right")
        for row in rows:
            cells = [
                row["size"],
                _shown(row["wrong_bits"]),
                str(row["wrong_sequences"]),
                _shown(row["cost_bits"]),
            ]
            shown.add_row(*cells, *([_shown(row["excess_bits"])] if with_least else []))
        Console(highlight=False).print(shown)
    if len(found) == len(SHIPPED) and not options.sizes:
        content = {"machine": machine(), "num_sequences": options.num_sequences, "models": found}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
