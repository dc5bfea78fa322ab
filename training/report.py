"""Reports: how well a finished run does at each size, on sequences that it has never been judged by.

`evaluate.py` measures. The result is a table for people, `evaluation.json` for programs and, by `plots.py`, a picture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from training import checkpoint
from training.checkpoint import BEST
from training.config import Settings, size_text
from training.evaluate import measure
from training.tasks import Size

EVALUATION = "evaluation.json"
# Not the seed by which the run chose its best checkpoint.
_SEED = 3_000_000
_MOST_SIZES = 10


def report(run_dir: Path, sizes: list[Size], num_sequences: int) -> dict[str, Any]:
    """Measure a run's best checkpoint, and write `evaluation.json` into the run.

    Args:
        run_dir: a training run.
        sizes: at which to measure; if empty, those of training (ten of them if there are more) and the settings'
            `evaluation.long_sizes`.
        num_sequences: of each size.

    Returns:
        what is in the file: the task, the checkpoint's update and, for each size, the means that `measure` gives.

    Raises:
        CheckpointError: the run has no whole checkpoint.
    """
    best = checkpoint.load(run_dir / BEST)
    cell, settings = checkpoint.restore_cell(best)
    rows = [
        {"size": size_text(size), **measure(cell, settings.task, size, num_sequences, _SEED)}
        for size in sizes or _default_sizes(settings)
    ]
    result = {
        "run": str(run_dir),
        "task": settings.task.name,
        "update": best.update,
        "num_sequences": num_sequences,
        "sizes": rows,
    }
    (run_dir / EVALUATION).write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(result: dict[str, Any], size_names: tuple[str, ...]) -> Table:
    """The report for the terminal."""
    shown = Table(
        title=f"{result['run']}, after update {result['update']}: means over {result['num_sequences']} sequences "
        "of each size",
        title_justify="left",
    )
    with_optimum = any(row["optimal_bits"] for row in result["sizes"])
    columns = [" x ".join(size_names), "wrong bits", "cost in bits"] + ["least possible"] * with_optimum
    for column in columns:
        shown.add_column(column, justify="right")
    for row in result["sizes"]:
        cells = [row["size"], f"{row['wrong_bits']:.2f}", f"{row['cost_bits']:.2f}"]
        shown.add_row(*cells, *[f"{row['optimal_bits']:.2f}"] * with_optimum)
    return shown


def _default_sizes(settings: Settings) -> list[Size]:
    sizes = settings.task.sizes()
    # From the largest down, so that this one is among them.
    some = sizes[:: -max(1, -(-len(sizes) // _MOST_SIZES))][::-1]
    return [*some, *settings.long_sizes]
