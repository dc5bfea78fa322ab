"""Reports: how well a finished run does at each size, on sequences that it has never been judged by.

Beside random ones it tries those of `tasks/patterns.py`: all zeros, all alike, a single bit, periodic.
`evaluate.py` measures. The result is a table for people, `evaluation.json` for programs and, by `plots.py`, a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from training import checkpoint
from training.checkpoint import BEST
from training.config import Settings, size_text
from training.evaluate import generator_for, judge, means
from training.model import Cell, PlainCell
from training.records import as_json
from training.tasks import PATTERNS, Pattern, Sequences, Size, Task

EVALUATION = "evaluation.json"
# Not the seed by which the run chose its best checkpoint.
_SEED = 3_000_000
_MOST_SIZES = 10
# Sequences of a pattern hardly differ.
_MOST_PATTERNED = 32
_NOT_SCORES = {"size", "patterns", "wrong_sequences", "num_sequences"}
_COLUMNS = {"cost_bits": "cost in bits", "optimal_bits": "least possible"}
_NORMAL_95 = 1.96  # Of a normal distribution 95 % lie within so many deviations.


def report(
    run_dir: Path,
    sizes: list[Size],
    num_sequences: int,
    memory_rows: int | None = None,
    patterns: Sequence[Pattern] = PATTERNS,
) -> dict[str, Any]:
    """Measure a run's best checkpoint, and write `evaluation.json` into the run.

    Args:
        run_dir: a training run.
        sizes: at which to measure; if empty, those of training (ten of them if there are more) and the settings'
            `evaluation.long_sizes`.
        num_sequences: of each size; of a pattern no more than 32.
        memory_rows: of the memory; as many as in training if not given.
        patterns: what is tried beside random sequences.

    Returns:
        what is in the file: the task, the checkpoint's update, the number of memory rows (none for a plain network)
        and, for each size, the means that `measure` gives, how many sequences have a wrong bit and, under
        `patterns`, the same for each pattern that the task has.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        SettingsError: the model cannot work with so many rows.
    """
    best = checkpoint.load(run_dir / BEST)
    cell, settings = checkpoint.restore_cell(best, memory_rows)
    task = settings.task
    rows = [
        {
            "size": size_text(size),
            **_of_random(cell, task, size, num_sequences),
            "patterns": _of_patterns(cell, task, size, min(num_sequences, _MOST_PATTERNED), patterns),
        }
        for size in sizes or _default_sizes(settings)
    ]
    result = {
        "run": str(run_dir),
        "task": settings.task.name,
        "update": best.update,
        "num_sequences": num_sequences,
        "memory_rows": None if isinstance(cell, PlainCell) else cell.initial_state(1).memory.shape[-1],
        "sizes": rows,
    }
    (run_dir / EVALUATION).write_text(as_json(result, indent=1) + "\n")
    return result


def table(result: dict[str, Any], size_names: tuple[str, ...]) -> Table:
    """The report for the terminal."""
    num_sequences = result["num_sequences"]
    with_rows = f", {result['memory_rows']} memory rows" if result["memory_rows"] else ""
    shown = Table(
        title=f"{result['run']}, after update {result['update']}{with_rows}: means over {num_sequences} sequences "
        "of each size",
        title_justify="left",
    )
    rows = result["sizes"]
    scores = [name for name in rows[0] if name not in _NOT_SCORES]
    if not any(row["optimal_bits"] for row in rows):
        scores.remove("optimal_bits")
    can_be_wrong = "wrong_sequences" in rows[0]
    columns = [_COLUMNS.get(name, name.replace("_", " ")) for name in scores]
    for column in [" x ".join(size_names), *columns, *["with a mistake, 95 %"] * can_be_wrong]:
        shown.add_column(column, justify="right")
    for row in rows:
        cells = [row["size"], *(_short(row[name]) for name in scores)]
        if can_be_wrong:
            least, most = interval(row["wrong_sequences"], row["num_sequences"])
            cells.append(f"{least:.1%} to {most:.1%}")
        shown.add_row(*cells)
    return shown


def table_of_patterns(result: dict[str, Any], size_names: tuple[str, ...]) -> Table | None:
    """Wrong bits where the sequences are not random; where the best possible predictor pays something, cost over its.

    None if none was measured.
    """
    patterns = [name for name in PATTERNS if any(name in row["patterns"] for row in result["sizes"])]
    if not patterns:
        return None
    with_optimum = any(row["optimal_bits"] for row in result["sizes"])
    error = next(iter(result["sizes"][0]["patterns"][patterns[0]]))
    what = "cost in bits above the least possible" if with_optimum else error.replace("_", " ")
    shown = Table(title=f"The same where sequences are not random: {what}", title_justify="left")
    for column in [" x ".join(size_names), *patterns]:
        shown.add_column(column, justify="right")
    for row in result["sizes"]:
        of_patterns = [row["patterns"].get(name) for name in patterns]
        values = [
            None
            if each is None
            else each["cost_bits"] - each["optimal_bits"]
            if with_optimum
            else each[error]
            for each in of_patterns
        ]
        shown.add_row(row["size"], *["-" if value is None else f"{value:.2f}" for value in values])
    return shown


def interval(num_wrong: int, num_sequences: int) -> tuple[float, float]:
    """Between which shares of all sequences the wrong ones are, by Wilson's interval of 95 %."""
    z = _NORMAL_95**2 / num_sequences
    share = num_wrong / num_sequences
    middle = share + z / 2
    reach = math.sqrt(z * (share * (1 - share) + z / 4))
    return max(0.0, (middle - reach) / (1 + z)), min(1.0, (middle + reach) / (1 + z))


def _of_random(cell: Cell, task: Task, size: Size, num_sequences: int) -> dict[str, Any]:
    return _measured(cell, task, task.draw(num_sequences, size, generator_for(size, _SEED)))


def _of_patterns(
    cell: Cell, task: Task, size: Size, num_sequences: int, patterns: Sequence[Pattern]
) -> dict[str, Any]:
    drawn = {
        pattern: task.draw_patterned(pattern, num_sequences, size, generator_for(size, _SEED))
        for pattern in patterns
    }
    return {
        pattern: _measured(cell, task, sequences)
        for pattern, sequences in drawn.items()
        if sequences is not None
    }


def _measured(cell: Cell, task: Task, sequences: Sequences) -> dict[str, Any]:
    judged = judge(cell, task, sequences)
    errors = judged[task.loss.error_name]
    measured: dict[str, Any] = dict(means(judged, task, sequences))
    if task.loss.is_error_counted:
        measured["wrong_sequences"] = int((errors > 0).sum())
    return measured | {"num_sequences": len(errors)}


def _short(score: float) -> str:
    """Two decimals, as befits bits, and more digits of what is smaller."""
    return f"{score:.2f}" if score == 0 or abs(score) >= 0.01 else f"{score:.2g}"


def _default_sizes(settings: Settings) -> list[Size]:
    sizes = settings.task.sizes()
    # From the largest down, so that this one is among them.
    some = sizes[:: -max(1, -(-len(sizes) // _MOST_SIZES))][::-1]
    return [*some, *settings.long_sizes]
