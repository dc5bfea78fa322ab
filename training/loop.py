"""The training itself, from top to bottom: draw sequences, unroll, step the optimiser, record, keep.

`config.py` says what to do, `checkpoint.py` how a run is kept, `evaluate.py` how it is judged. A run
directory holds `settings.toml`, `last.pt`, `best.pt`, `metrics.jsonl`, `tensorboard/` and `lock`.
"""

from __future__ import annotations

import fcntl
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import checkpoint as checkpoints
from training.checkpoint import BEST, LAST, Checkpoint
from training.config import Settings, make_cell, write_settings
from training.errors import NonFiniteError, RunDirectoryError
from training.evaluate import evaluate, is_solved, total
from training.model import unroll
from training.records import Records

SETTINGS = "settings.toml"
LOCK = "lock"


def train(settings: Settings, command: str, *, resume: bool, console: Console) -> int | None:
    """Run the settings' updates, in a fresh run directory or, with `resume`, from its last checkpoint.

    Args:
        settings: what to do.
        command: what was typed, for the records.
        resume: go on where the run directory's last checkpoint stands.
        console: where progress is shown.

    Returns:
        None, or the number of the signal that ended the run early; it is then saved and can be resumed.

    Raises:
        RunDirectoryError: the directory holds a run and `resume` is not set, or another process trains there.
        CheckpointError: there is no checkpoint to resume from, or it is truncated.
        NonFiniteError: the loss or a gradient is not a number; the last good checkpoint is kept.
    """
    with _locked(settings.run_dir, resume) as run_dir, _stop_signals() as stop:
        torch.set_num_threads(settings.num_threads)
        torch.manual_seed(settings.seed)
        cell = make_cell(settings)
        optimizer = torch.optim.RMSprop(
            cell.parameters(),
            lr=settings.optimizer.learning_rate,
            alpha=settings.optimizer.square_decay,
            momentum=settings.optimizer.momentum,
        )
        draws = torch.Generator().manual_seed(settings.seed + 1)
        update, seconds_before, metrics, best_score = 0, 0.0, dict[str, float](), math.inf
        solved: dict[str, float] = {}

        if resume:
            last = checkpoints.load(run_dir / LAST)
            cell.load_state_dict(last.cell)
            optimizer.load_state_dict(last.optimizer)
            torch.set_rng_state(last.random_state)
            draws.set_state(last.sequences_state)
            update, seconds_before, metrics, best_score = (
                last.update,
                last.seconds,
                last.metrics,
                last.best_score,
            )
            solved, command = last.solved, last.command
            console.print(f"resuming after update {update}")
        write_settings(settings, run_dir / SETTINGS)
        started = time.monotonic()

        def keep(name: str) -> None:
            records.sync()
            checkpoints.save(
                Checkpoint(
                    settings=settings.model_dump(mode="json"),
                    command=command,
                    update=update,
                    seconds=seconds_before + time.monotonic() - started,
                    cell=cell.state_dict(),
                    optimizer=optimizer.state_dict(),
                    random_state=torch.get_rng_state(),
                    sequences_state=draws.get_state(),
                    metrics=metrics,
                    best_score=best_score,
                    solved=solved,
                ),
                run_dir / name,
            )

        with Records(run_dir, after_update=update) as records, _progress(console) as progress:
            bar = progress.add_task("", total=settings.num_updates, completed=update, shown="")
            if not resume:
                keep(LAST)  # From here on there is a run to resume, whatever happens.
            while update < settings.num_updates and stop.signal is None:
                length = settings.task.draw_length(draws)
                sequences = settings.task.draw(settings.batch_size, length, draws)
                outputs, _ = unroll(cell, sequences.inputs)
                answers = outputs[-len(sequences.targets) :]
                loss = F.binary_cross_entropy_with_logits(answers, sequences.targets)

                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                norm = torch.nn.utils.clip_grad_norm_(cell.parameters(), settings.optimizer.clip_norm)
                _check_finite(loss, norm, update + 1, run_dir)
                optimizer.step()
                update += 1

                seconds = seconds_before + time.monotonic() - started
                wrong = ((answers > 0) != sequences.targets.bool()).sum() / settings.batch_size
                record = {
                    "sequences": update * settings.batch_size,
                    "seconds": seconds,
                    "length": length,
                    "loss": loss.item(),
                    "wrong_bits_in_training": wrong.item(),
                    "gradient_norm": norm.item(),
                }
                is_due = update % settings.evaluation.every_updates == 0
                if is_due or update == settings.num_updates:
                    metrics = evaluate(cell, settings)
                    record |= metrics
                    console.print(_line(update, settings, seconds, metrics))
                    # Not at an end that is not due: a run that is resumed to go further must not differ by it.
                    if is_due and not solved and is_solved(metrics):
                        solved = {"update": update, "seconds": seconds}
                        for group in optimizer.param_groups:
                            group["lr"] = settings.optimizer.settled_learning_rate
                    # Of two that do equally well the later one is surer of itself.
                    if total(metrics) <= best_score:
                        best_score = total(metrics)
                        keep(BEST)
                records.add(update, record)
                if update % settings.checkpoint_every_updates == 0:
                    keep(LAST)
                rate = update * settings.batch_size / seconds
                shown = f"loss {loss.item():.4f}  wrong bits {wrong.item():6.2f}  {rate:4.0f} sequences/s"
                progress.update(bar, completed=update, shown=shown)
            keep(LAST)
        return stop.signal if update < settings.num_updates else None


def _check_finite(loss: torch.Tensor, gradient_norm: torch.Tensor, update: int, run_dir: Path) -> None:
    for name, value in ("loss", loss), ("gradient's norm", gradient_norm):
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"at update {update} the {name} is {value.item()}: the last good checkpoint is kept in {run_dir}; "
                "start again in another --run-dir with a lower --optimizer.learning-rate or --optimizer.clip-norm"
            )


def _line(update: int, settings: Settings, seconds: float, metrics: dict[str, float]) -> str:
    scores = "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in metrics.items())
    return f"{update * settings.batch_size:7d} sequences  {seconds:5.0f} s  {scores}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("update"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _locked(run_dir: Path, resume: bool) -> Iterator[Path]:
    """Own the run directory, or refuse."""
    if resume and not run_dir.is_dir():
        raise RunDirectoryError(f"there is no run in {run_dir} to resume: leave out --resume to start one")
    if run_dir.exists() and not run_dir.is_dir():
        raise RunDirectoryError(f"{run_dir} is a file: give another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as lock:
        _lock(lock, run_dir)
        if not resume and any(path.name != LOCK for path in run_dir.iterdir()):
            raise RunDirectoryError(
                f"{run_dir} is in use: give another --run-dir, or go on there with --resume"
            )
        yield run_dir


def _lock(lock: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunDirectoryError(f"another process is training in {run_dir}: wait for it or stop it") from None


class _Stop:
    """Remembers that somebody asked the run to end."""

    signal: int | None = None

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """Let the batch finish; whoever asks again ends the process at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
