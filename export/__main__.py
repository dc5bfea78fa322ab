"""The command line: `python -m export runs/copy models/copy/1`, and back by `python -m export restore`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from export.errors import ExportError
from export.publish import MODEL_FILE, publish
from export.restore import restore
from export.verification import LARGEST_INVARIANT_BATCH, Report
from training.errors import TrainingError


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    command = _restore if arguments[:1] == ["restore"] else _export
    torch.set_num_threads(1)  # See `publish.py`.
    try:
        command(arguments)
    except (ExportError, TrainingError) as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def _restore(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export restore",
        description="Make a run directory of a model file, to evaluate the model, draw it, or train on from it.",
    )
    parser.add_argument("model", type=Path, help="version directory of a model, such as models/copy/1")
    parser.add_argument("run", type=Path, help="new run directory, such as runs/shipped-copy")
    options = parser.parse_args(arguments[1:])
    checkpoint = restore(options.model / MODEL_FILE, options.run)
    Console(highlight=False).print(
        f"{options.run} has the weights of {options.model}, after update {checkpoint.update}: evaluate it, plot it, or "
        "start from it by --init-from",
        soft_wrap=True,
    )


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Write a trained model's step as an ONNX file that carries its own description, verify it, "
        "and put it where the server looks for models.",
    )
    parser.add_argument("run", type=Path, help="run directory of a training, such as runs/copy")
    parser.add_argument("target", type=Path, help="new version directory, such as models/copy/1")
    parser.add_argument(
        "--memory-rows",
        type=_positive,
        help="rows of the memory, a multiple of 4, where nothing in the model is learned for each row; default: as in "
        "training",
    )
    options = parser.parse_args(arguments)
    checkpoint, report = publish(options.run, options.target, options.memory_rows)
    scores = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in checkpoint.metrics.items())
    Console(highlight=False).print(
        f"the best checkpoint of {options.run}, after update {checkpoint.update}: {scores}", soft_wrap=True
    )
    _show(report, options.target / MODEL_FILE)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _show(report: Report, path: Path) -> None:
    table = Table(
        title=f"{path}: {report.num_nodes} nodes, {report.num_bytes / 1e3:.0f} kB", title_justify="left"
    )
    table.add_column("verified")
    table.add_column("result")
    table.add_row("onnx.checker, full check", "valid")
    for size, difference in report.differences.items():
        table.add_row(
            f"against torch, {report.num_steps} steps in closed loop, batch {size}",
            f"outputs within {difference.output:.0e}, states {difference.state:.0e}",
        )
    table.add_row(f"each row in batches of 1 to {LARGEST_INVARIANT_BATCH}", "the same bits")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
