"""The command line: `python -m training copy --seed 3 --run-dir runs/copy`, and what is done with runs.

Settings and flags are read here and nowhere else; `loop.py`, `report.py`, `plots.py` and `sweep.py` do the work.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from training import checkpoint
from training.checkpoint import BEST, LAST
from training.config import Settings, experiments, parse_sizes, read_experiment, resolve
from training.errors import DIVERGED, NonFiniteError, SettingsError, TrainingError
from training.loop import train
from training.tasks import PATTERNS, Pattern

_USAGE = """\
usage: python -m training EXPERIMENT [--resume] [--SETTING VALUE ...]
       python -m training evaluate RUN [--sizes SIZE,SIZE,...] [--num-sequences N] [--memory-rows N]
       python -m training plot RUN [RUN ...] [--size SIZE] [--memory-rows N] [--to FOLDER]
       python -m training sweep EXPERIMENT --seeds 0-9 --to FOLDER [--vary SETTING=VALUE,VALUE ...] [--jobs N]

Train a Neural Turing Machine. The experiments are: {experiments}.

  python -m training copy                                        train in runs/copy
  python -m training copy --seed 3 --run-dir runs/copy3          another seed, elsewhere
  python -m training copy --optimizer.learning-rate 5e-4         any setting of the experiment
  python -m training copy --resume                               go on after Ctrl-C or a crash
  python -m training my.toml                                     an experiment of your own
  python -m training my_module:MyTask                            a task of your own, all settings by default
  python -m training copy --help                                 all settings
  python -m training evaluate runs/copy                          errors by size: a table, JSON and a plot
  python -m training plot runs/copy                              learning curve, the machine at work, its memory
  python -m training sweep copy --seeds 0-9 --to runs/copies     ten runs; again: go on with those not ended

A run directory holds settings.toml, the checkpoints last.pt and best.pt, metrics.jsonl and tensorboard/.\
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    console = Console(stderr=True, highlight=False, quiet=int(os.environ.get("RANK", 0)) > 0)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(experiments=", ".join(experiments())))
        return 0 if arguments else 2
    command: Callable[[Sequence[str], Console], int] = _COMMANDS.get(arguments[0], _train)
    try:
        return command(arguments, console)
    except TrainingError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return DIVERGED if isinstance(error, NonFiniteError) else 1
    except OSError as error:
        console.print(
            f"error: a file cannot be read or written ({error}): make it possible, or choose another place",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return 1
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not _is_too_large(error):
            raise
        console.print(
            "error: this needs more memory than there is: make the batch, the sizes or the number of sequences smaller",
            style="red",
            soft_wrap=True,
        )
        return 1


def _is_too_large(error: Exception) -> bool:
    """Whether there is too little memory for what was asked for, or its size cannot even be counted."""
    said = str(error).lower()
    words = ("allocate memory", "out of memory", "overflow", "invalid shape dimension", "too large")
    return isinstance(error, MemoryError | OverflowError) or any(word in said for word in words)


def _train(arguments: Sequence[str], console: Console) -> int:
    experiment, *overrides = arguments
    prog = f"python -m training {experiment}"
    resume = "--resume" in overrides
    if resume:
        overrides.remove("--resume")
    settings = read_experiment(experiment, overrides, prog)
    if resume:
        settings = _settings_to_resume(settings.run_dir, overrides, prog)
    command = shlex.join(["python", "-m", "training", *arguments])
    signal_number = train(settings, command, resume=resume, console=console)
    if signal_number is not None:
        resuming = shlex.join(
            ["python", "-m", "training", experiment, "--run-dir", str(settings.run_dir), "--resume"]
        )
        console.print(f"saved; go on with: {resuming}", markup=False, soft_wrap=True)
        return 128 + signal_number
    console.print(f"done; the model is in {settings.run_dir}", markup=False, soft_wrap=True)
    return 0


def _settings_to_resume(run_dir: Path, overrides: Sequence[str], prog: str) -> Settings:
    """The settings that the run in a directory was started with; only how far it goes, on how many cores, and its step
    size may be changed, the latter to a lesser one."""
    last = checkpoint.load(run_dir / LAST)
    values = last.settings | {"run_dir": str(run_dir)}
    started_with = resolve(values, run_dir / LAST, [], prog)
    wanted = resolve(values, run_dir / LAST, overrides, prog)
    rate, rate_before = wanted.optimizer.learning_rate, started_with.optimizer.learning_rate
    may_change = {
        "num_updates": wanted.num_updates,
        "cpu_minutes": wanted.cpu_minutes,
        "num_threads": wanted.num_threads,
        "loggers": wanted.loggers,
        "optimizer": started_with.optimizer.model_copy(update={"learning_rate": rate}),
        "evaluation": started_with.evaluation.model_copy(update={"enough": wanted.evaluation.enough}),
    }
    if wanted != started_with.model_copy(update=may_change):
        raise SettingsError(
            f"the run in {run_dir} is resumed with the settings it was started with: leave out all but --run-dir, "
            "--num-updates, --cpu-minutes, --num-threads, --loggers, --evaluation.enough and a lower "
            "--optimizer.learning-rate"
        )
    if rate > rate_before:
        raise SettingsError(
            f"optimizer.learning_rate {rate:g} is more than the {rate_before:g} that the run was started with: it can "
            "only be resumed with a lower one"
        )
    if wanted.num_updates < last.update:
        raise SettingsError(
            f"num_updates {wanted.num_updates} is less than the {last.update} updates that the run has made"
        )
    if wanted.num_updates != started_with.num_updates and wanted.optimizer.schedule != "settle":
        raise SettingsError(
            "the step size falls to 0 at num_updates, so the run cannot be made longer: start another"
        )
    return wanted


def _evaluate(arguments: Sequence[str], _console: Console) -> int:
    # The figures' library takes a second to load, which training need not wait for.
    from training import plots, report

    parser = _Parser(
        prog="python -m training evaluate", description="Errors by size, of the best checkpoint."
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--sizes", default="", help="such as 10,20 or 20x10; default: of training and beyond")
    parser.add_argument("--num-sequences", type=_positive, default=200, help="of each size (default: 200)")
    parser.add_argument(
        "--patterns",
        default=",".join(PATTERNS),
        help="what to try beside random sequences, such as zeros,periodic, or none (default: all)",
    )
    _add_memory_rows(parser)
    options = parser.parse_args(arguments[1:])
    patterns = _patterns(options.patterns)
    torch.set_num_threads(1)
    settings = checkpoint.restore_settings(checkpoint.load(options.run / BEST))
    sizes = parse_sizes(options.sizes.split(",") if options.sizes else [], settings.task, "--sizes")
    result = report.report(options.run, sizes, options.num_sequences, options.memory_rows, patterns)
    out, size_names = Console(highlight=False), settings.task.size_names
    out.print(report.table(result, size_names))
    if (of_patterns := report.table_of_patterns(result, size_names)) is not None:
        out.print(of_patterns)
    picture = options.run / "evaluation.png"
    plots.plot_evaluation({options.run.name: result}, settings.task.size_names, picture)
    print(f"written: {options.run / report.EVALUATION}, {picture}")
    return 0


def _plot(arguments: Sequence[str], console: Console) -> int:
    from training import plots

    parser = _Parser(
        prog="python -m training plot",
        description="Of one run, its learning curve, the machine at work on a sequence, and its memory as an "
        "animation. Of several, or of folders of runs, their learning curves, one for each folder.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run directories, or folders of them, such as a sweep's"
    )
    parser.add_argument("--size", default="", help="of the sequence; default: the largest of training")
    parser.add_argument("--to", type=Path, help="folder for the pictures; default: the first of the runs")
    _add_memory_rows(parser)
    options = parser.parse_args(arguments[1:])
    torch.set_num_threads(1)
    names = [path.name for path in options.runs]
    groups = {
        path.name if names.count(path.name) == 1 else str(path): _runs_in(path) for path in options.runs
    }
    is_one_run = list(groups.values()) == [options.runs]
    if options.memory_rows is not None and not is_one_run:
        raise SettingsError("--memory-rows is for the pictures of one run: give one, or leave it out")
    folder = options.to or options.runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    curves = {}
    first: Path | None = None
    for name, runs in groups.items():
        drawn = {}
        for run in runs:
            try:
                curve = plots.read_curve(run, checkpoint.load(run / LAST).update)
            except TrainingError as error:
                console.print(f"{run} is left out: {error}", markup=False, soft_wrap=True)
                continue
            if curve.num_missing:
                console.print(
                    f"{run}: the records of {curve.num_missing} updates are damaged or missing",
                    markup=False,
                    soft_wrap=True,
                )
            if curve.sequences:
                drawn[run] = curve
            else:
                console.print(f"{run} has no evaluation yet, and is left out", markup=False, soft_wrap=True)
        if drawn:
            curves[name] = list(drawn.values())
            first = first or next(iter(drawn))
    if first is None:
        raise SettingsError("there is no evaluation to draw yet: train on, or evaluate more often")
    task = checkpoint.restore_settings(checkpoint.load(first / LAST)).task
    written = [folder / "learning.png"]
    plots.plot_learning(curves, task.name, written[0])
    if is_one_run:
        cell, _ = checkpoint.restore_cell(checkpoint.load(options.runs[0] / BEST), options.memory_rows)
        [size] = parse_sizes([options.size], task, "--size") if options.size else [max(task.sizes())]
        traced, title = plots.trace(cell, task, size), plots.heading(task, size)
        written.append(folder / "machine.png")
        plots.plot_machine(traced, title, written[-1])
        if traced.memory.size:
            written.append(folder / "memory.gif")
            plots.animate_memory(traced, title, written[-1])
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _runs_in(path: Path) -> list[Path]:
    """The run directory itself, or the runs in a folder."""
    runs = [path] if (path / LAST).exists() else sorted(last.parent for last in path.glob(f"*/{LAST}"))
    if not runs:
        if (path / "model.onnx").exists():
            checkpoint.load(path / LAST)  # It says what to do with a model.
        raise SettingsError(f"{path} is not a run, and holds none: train there first")
    return runs


def _sweep(arguments: Sequence[str], console: Console) -> int:
    from training.sweep import sweep, tables, variations

    parser = _Parser(
        prog="python -m training sweep",
        description="Many runs of one experiment. All other flags are settings of every run.",
    )
    parser.add_argument("experiment")
    parser.add_argument("--seeds", default="0", help="such as 0-9 or 3,5,8 (default: 0)")
    parser.add_argument(
        "--vary", action="append", default=[], help="SETTING=VALUE,VALUE,...; may be repeated"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder that receives the runs")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at a time (default: 1)")
    options, settings = parser.parse_known_args(arguments[1:])
    runs = variations(options.seeds, options.vary)
    for varied in runs:  # A setting that cannot work is refused before any run is made.
        flags = [*settings, *(f"--{flag}={value}" for flag, value in varied.items())]
        read_experiment(options.experiment, flags, parser.prog)
    rows = sweep(options.experiment, settings, runs, options.to, options.jobs, console)
    out = Console(highlight=False)
    for part in tables(rows, out.width):
        out.print(part)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def _add_memory_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-rows",
        type=_positive,
        help="rows of the memory, where nothing in the model is learned for each row; default: as in training",
    )


def _patterns(text: str) -> list[Pattern]:
    named = [] if text == "none" else text.split(",")
    for name in named:
        if name not in PATTERNS:
            raise SettingsError(f"--patterns: {name!r} is none of {', '.join(PATTERNS)}")
    return [pattern for pattern in PATTERNS if pattern in named]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_COMMANDS: dict[str, Callable[[Sequence[str], Console], int]] = {
    "evaluate": _evaluate,
    "plot": _plot,
    "sweep": _sweep,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
