"""Sweeps: many runs of one experiment, with other seeds or settings, and a table of what became of them.

Each run is a process of its own, `python -m training EXPERIMENT ...`, in a folder of the sweep's. A sweep that was
stopped is given again with the same command: runs that have ended are left alone, others go on from their last
checkpoint.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from training import checkpoint
from training.checkpoint import LAST
from training.errors import DIVERGED, CheckpointError, SettingsError, SweepError
from training.loop import end_reason
from training.records import as_json

SUMMARY = "summary.json"
_MOST_SEEDS = 10_000


def variations(seeds: str, vary: Sequence[str]) -> list[dict[str, str]]:
    """The settings of every run, by flag: each seed with each combination of the values.

    Args:
        seeds: such as "0-9" or "3,5,8".
        vary: each such as "optimizer.learning-rate=1e-3,3e-4".

    Raises:
        SettingsError: one of them is not of that form.
    """
    choices = [[{"seed": str(seed)} for seed in _numbers(seeds)]]
    for each in vary:
        flag, equals, values = each.partition("=")
        if not flag or not equals or not all(values.split(",")):
            raise SettingsError(f"--vary {each!r} is not SETTING=VALUE,VALUE,...")
        choices.insert(0, [{flag.removeprefix("--"): value} for value in values.split(",")])
    return [
        {key: value for part in parts for key, value in part.items()} for parts in itertools.product(*choices)
    ]


def sweep(
    experiment: str,
    settings: Sequence[str],
    runs: list[dict[str, str]],
    folder: Path,
    jobs: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Make the runs that have not ended yet, `jobs` at a time, and write `summary.json` into the folder.

    Raises:
        SweepError: a run failed, or the folder cannot be written to. The other runs are made, and the summary is
            written.
    """
    folders = {folder / _name(varied): varied for varied in runs}
    failed: list[str] = []
    diverged: list[str] = []
    rows: list[dict[str, Any]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{folder} cannot be a folder ({error}): choose another --to") from None
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        made = {
            pool.submit(_run, experiment, settings, varied, path): path for path, varied in folders.items()
        }
        for future in concurrent.futures.as_completed(made):
            path, problem = made[future], future.result()
            said = "done" if problem is None else problem.message
            console.print(f"{path}: {said}", markup=False, soft_wrap=True)
            if problem is not None:
                (diverged if problem.is_divergence else failed).append(path.name)
    for path in folders:
        with contextlib.suppress(CheckpointError):  # It was said why.
            rows.append(summarise(path))
    try:
        (folder / SUMMARY).write_text(as_json(rows, indent=1) + "\n")
    except OSError as error:
        raise SweepError(f"{folder / SUMMARY} cannot be written ({error}): choose another --to") from None
    problems = []
    if diverged:
        problems.append(
            f"{len(diverged)} of {len(runs)} runs diverged: {', '.join(diverged)}; with these settings they will "
            "again, so give a lower --optimizer.learning-rate or --optimizer.clip-norm and another --to"
        )
    if failed:
        problems.append(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; once what they say is mended, give the "
            "command again"
        )
    if problems:
        raise SweepError("; ".join(problems))
    return rows


def summarise(run_dir: Path) -> dict[str, Any]:
    """What became of a run: when it met its goal, what it has cost, and its scores at its best.

    Raises:
        CheckpointError: it has no whole checkpoint.
    """
    last = checkpoint.load(run_dir / LAST)
    solved = last.solved
    best = checkpoint.load(run_dir / checkpoint.BEST).metrics if (run_dir / checkpoint.BEST).exists() else {}
    batch = last.settings["batch_size"]
    return {
        "run": run_dir.name,
        "solved_at_sequences": int(solved["update"]) * batch if solved else None,
        "solved_at_cpu_minutes": round(solved["cpu_seconds"] / 60, 2) if solved else None,
        "sequences": last.update * batch,
        "cpu_minutes": round(last.cpu_seconds / 60, 2),
        **best,
    }


def tables(rows: list[dict[str, Any]], width: int) -> list[Table]:
    """The summary for a terminal of so many columns: as many tables as it takes to break no word."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "run"))
    name_width = min(max([len("run"), *(len(row["run"]) for row in rows)]), max(width // 2, 10))
    parts: list[list[str]] = []
    left = 0
    for column in columns:
        # Its longest word, and the lines and spaces around it.
        needed = 3 + max(map(len, [*column.split("_"), *(_cell(row, column) for row in rows)]))
        if needed > left:
            parts.append([])
            left = width - name_width - 4
        parts[-1].append(column)
        left -= needed
    return [_table(rows, part, name_width) for part in parts]


def _table(rows: list[dict[str, Any]], columns: list[str], name_width: int) -> Table:
    shown = Table()
    shown.add_column("run", overflow="fold", width=name_width)
    for column in columns:
        longest = max(map(len, [*column.split("_"), *(_cell(row, column) for row in rows)]))
        shown.add_column(column.replace("_", " "), justify="right", min_width=longest)
    for row in rows:
        shown.add_row(row["run"], *(_cell(row, column) for column in columns))
    return shown


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    return "-" if value is None else _short(value)


class _Problem(NamedTuple):
    """Why a run has not been made."""

    message: str
    is_divergence: bool = False


def _run(experiment: str, settings: Sequence[str], varied: dict[str, str], run_dir: Path) -> _Problem | None:
    """Make one run, or go on with it; returns what went wrong."""
    command = [sys.executable, "-m", "training", experiment, "--run-dir", str(run_dir)]
    if (run_dir / LAST).exists():
        try:
            last = checkpoint.load(run_dir / LAST)
            restored = checkpoint.restore_settings(last)
        except CheckpointError as error:
            return _Problem(str(error))
        if end_reason(restored, last.update, last.cpu_seconds, last.best_score) is not None:
            return None
        command.append("--resume")
    else:
        command += [*settings, *(f"--{flag}={value}" for flag, value in varied.items())]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603  # nosec B603  # a command of our own
    if ended.returncode == 0:
        return None
    said = ended.stderr.strip().splitlines()
    message = said[-1] if said else f"ended with {ended.returncode}"
    return _Problem(message, is_divergence=ended.returncode == DIVERGED)


def _name(varied: dict[str, str]) -> str:
    """Such as `learning-rate=1e-3,seed=4`: the last part of a flag says enough."""
    return ",".join(f"{flag.rpartition('.')[2]}={value}" for flag, value in varied.items()).replace("/", "-")


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part.strip())
        if bounds is None or int(bounds[1]) > int(bounds[2] or bounds[1]):
            raise SettingsError(f"--seeds {text!r} is not a list such as 0-9 or 3,5,8")
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if len(numbers) + last - first >= _MOST_SEEDS:
            raise SettingsError(f"--seeds {text!r} are more than {_MOST_SEEDS}")
        numbers += range(first, last + 1)
    return numbers


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
