"""The training itself, from top to bottom: draw sequences, unroll, step the optimiser, record, keep.

`config.py` says what to do, `checkpoint.py` how a run is kept, `evaluate.py` how it is judged. A run
directory holds `settings.toml`, `last.pt`, `best.pt`, `metrics.jsonl`, `tensorboard/` and `lock`.

Devices, precision and several processes are Lightning Fabric's. Under `torchrun` every process draws the sequences of
all and takes its own, so that the run is the one that a single process makes of as large a batch. The first process
evaluates, records and saves.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training import checkpoint as checkpoints
from training.checkpoint import BEST, LAST, Checkpoint
from training.config import OptimizerSettings, Settings, make_cell, write_settings
from training.errors import NonFiniteError, RunDirectoryError, SettingsError
from training.evaluate import evaluate, is_solved, total
from training.losses import Scores, mean
from training.model import Cell, RecurrentLayer
from training.records import Records
from training.tasks import Sequences

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
        SettingsError: the device is not there.
        RunDirectoryError: the directory holds a run and `resume` is not set, another process trains there, or the
            records cannot be written.
        CheckpointError: there is no checkpoint to resume from, it is truncated or of another model, or one cannot be
            written.
        NonFiniteError: the loss or a gradient is not a number; the last good checkpoint is kept.
    """
    fabric = _fabric(settings)
    is_first = fabric.global_rank == 0
    run_dir = settings.run_dir
    with _locked(run_dir, resume) if is_first else nullcontext(), _stop_signals() as stop:
        run = _Run(settings, command, fabric)
        if resume:
            run.restore(checkpoints.load(run_dir / LAST))
            console.print(f"resuming after update {run.update}")
        if not is_first:
            run.update_until_over(None, None, stop, Console(quiet=True))
            return None
        try:
            write_settings(settings, run_dir / SETTINGS)
            with Records(run_dir, after_update=run.update) as records, _progress(console) as progress:
                if not resume:
                    run.save_checkpoint(
                        LAST, records
                    )  # From here on there is a run to resume, whatever happens.
                run.update_until_over(records, progress, stop, console)
                run.save_checkpoint(LAST, records)
        except OSError as error:
            raise RunDirectoryError(
                f"{run_dir} cannot be written to ({error}): the last good checkpoint is kept; make room and --resume"
            ) from None
        return stop.signal if not run.is_over else None


def is_over(settings: Settings, update: int, cpu_seconds: float, best_score: float) -> bool:
    """Whether all updates are made, the time is used up, or the model is as good as it needs to be."""
    limit, enough = settings.cpu_minutes, settings.evaluation.enough
    return (
        update >= settings.num_updates
        or (limit is not None and cpu_seconds >= 60 * limit)
        or (enough is not None and best_score <= enough)
    )


class _Run:
    """A run between two updates, and how it gets from one to the next."""

    def __init__(self, settings: Settings, command: str, fabric: Fabric) -> None:
        torch.set_num_threads(settings.num_threads)
        torch.manual_seed(settings.seed)
        self.settings, self.command, self.fabric = settings, command, fabric
        self.cell = make_cell(settings)
        decay = settings.optimizer.average_decay
        self.averaged: Cell = self.cell
        self._average = None
        if decay:
            self._average = AveragedModel(self.cell, multi_avg_fn=_mean_with(decay)).to(fabric.device)
            self.averaged = cast("Cell", self._average.module)
        self.layer, self.optimizer = fabric.setup(
            RecurrentLayer(self.cell), _optimizer(self.cell, settings.optimizer)
        )
        self.sequence_generator = torch.Generator().manual_seed(settings.seed + 1)
        self.update, self.metrics, self.best_score = 0, Scores(), math.inf
        self.solved: dict[str, float] = {}
        self._seconds_before, self._cpu_seconds_before = 0.0, 0.0
        self._started, self._cpu_started = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        """That the run has taken."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def cpu_seconds(self) -> float:
        """Of processor time that this process has used for the run."""
        return self._cpu_seconds_before + time.process_time() - self._cpu_started

    @property
    def is_over(self) -> bool:
        """See the function."""
        return is_over(self.settings, self.update, self.cpu_seconds, self.best_score)

    def restore(self, last: Checkpoint) -> None:
        """Go on where a checkpoint stands."""
        checkpoints.load_weights(self.cell, last.cell)
        checkpoints.load_weights(self.averaged, last.averaged)
        self.optimizer.load_state_dict(last.optimizer)
        torch.set_rng_state(last.random_state)
        self.sequence_generator.set_state(last.sequences_state)
        if self._average is not None:
            self._average.n_averaged.fill_(
                last.update % (self.settings.restart_every_updates or last.update + 1)
            )
        self.command, self.update = last.command, last.update
        self.metrics, self.best_score, self.solved = last.metrics, last.best_score, last.solved
        self._seconds_before, self._cpu_seconds_before = last.seconds, last.cpu_seconds

    def save_checkpoint(self, name: str, records: Records) -> None:
        """Save a checkpoint, never without what was recorded up to it."""
        records.sync()
        checkpoints.save(
            Checkpoint(
                settings=self.settings.model_dump(mode="json"),
                command=self.command,
                update=self.update,
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                cell=self.cell.state_dict(),
                averaged=self.averaged.state_dict(),
                optimizer=self.optimizer.state_dict(),
                random_state=torch.get_rng_state(),
                sequences_state=self.sequence_generator.get_state(),
                metrics=self.metrics,
                best_score=self.best_score,
                solved=self.solved,
            ),
            self.settings.run_dir / name,
        )

    def update_until_over(
        self, records: Records | None, progress: Progress | None, stop: _Stop, console: Console
    ) -> None:
        """Update until the run is over or somebody asks it to stop; the first process alone has records."""
        settings = self.settings
        if progress is not None:
            bar = progress.add_task("", total=settings.num_updates, completed=self.update, shown="")
        while not self._agreed(self.is_over or stop.signal is not None):
            record = self._step()
            if self.update % settings.evaluation.every_updates == 0 or self.update == settings.num_updates:
                record |= self._evaluate(records, console)
            if records is None or progress is None:
                continue
            records.add(self.update, record)
            if self.update % settings.checkpoint_every_updates == 0:
                self.save_checkpoint(LAST, records)
            rate = record["sequences"] / record["seconds"]
            error = settings.task.loss.error_name
            shown = f"loss {record['loss']:.4f}  {error.replace('_', ' ')} {record[f'{error}_in_training']:6.2f}  "
            progress.update(bar, completed=self.update, shown=f"{shown}{rate:4.0f} sequences/s")

    def _step(self) -> dict[str, float]:
        """One update; returns what is recorded of it."""
        settings, fabric = self.settings, self.fabric
        size = settings.task.draw_size(self.sequence_generator)
        batch_size = settings.batch_size * fabric.world_size
        task = settings.task
        drawn = task.check(task.draw_for_training(batch_size, size, self.sequence_generator), batch_size)
        sequences, targets, mask = self._own(drawn), drawn.targets, drawn.mask
        answers = self.layer(sequences.inputs)[0][-len(targets) :].float()
        # An answer weighs as much in whichever process it is: their means are averaged.
        num_counted = None if mask is None else float(mask.sum()) / fabric.world_size
        loss = mean(task.loss.costs(answers, sequences.targets), sequences.mask, num_counted)

        self.optimizer.zero_grad()
        fabric.backward(loss)
        norm = fabric.clip_gradients(
            self.layer, self.optimizer, max_norm=settings.optimizer.clip_norm, error_if_nonfinite=False
        )
        assert norm is not None
        self._check_finite(loss, norm)
        if settings.optimizer.schedule == "linear":
            self._set_learning_rate(
                settings.optimizer.learning_rate * (1 - self.update / settings.num_updates)
            )
        self.optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.cell)
        self.update += 1

        errors = mean(
            task.loss.errors(answers.detach(), sequences.targets),
            sequences.mask,
            settings.batch_size if task.loss.is_error_counted else num_counted,
        )
        loss, error = self._mean(torch.stack([loss.detach(), errors])).tolist()
        return {
            "sequences": self.update * settings.batch_size * fabric.world_size,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "steps": len(sequences.inputs),
            "loss": loss,
            f"{task.loss.error_name}_in_training": error,
            "gradient_norm": float(norm),
        }

    def _evaluate(self, records: Records | None, console: Console) -> Scores:
        """Judge the model, keep it if it is the best so far, and settle once it solves the task."""
        settings = self.settings
        if records is not None:
            self.metrics = evaluate(self.averaged, settings)
            sequences = self.update * settings.batch_size * self.fabric.world_size
            scores = "  ".join(
                f"{name.replace('_', ' ')} {value:.2f}" for name, value in self.metrics.items()
            )
            console.print(f"{sequences:7d} sequences  {self.seconds:5.0f} s  {scores}")
        self.metrics = self.fabric.broadcast(self.metrics)
        # Not at an end that is not due: a run that is resumed to go further must not differ by it.
        is_due = self.update % settings.evaluation.every_updates == 0
        if is_due:
            self._note_solved_and_lower_rate()
        # Of two that do equally well the later one is surer of itself.
        score = total(self.metrics, settings.task)
        if score <= self.best_score:
            self.best_score = score
            if records is not None:
                self.save_checkpoint(BEST, records)
        restart = settings.restart_every_updates
        if restart is not None and self.update % restart == 0 and not self.is_over:
            self._restart()
        return self.metrics

    def _restart(self) -> None:
        """Begin again with fresh weights; everything else goes on."""
        fresh = make_cell(self.settings)
        for cell in (self.cell, self.averaged):
            cell.load_state_dict(fresh.state_dict())
        if self._average is not None:
            self._average.n_averaged.zero_()
        self.optimizer.state.clear()
        self._set_learning_rate(self.settings.optimizer.learning_rate)

    def _note_solved_and_lower_rate(self) -> None:
        """Note when the task is first solved, and from where the schedule says on take smaller steps."""
        task, optimizer = self.settings.task, self.settings.optimizer
        if not self.solved and is_solved(self.metrics, task):
            self.solved = {"update": self.update, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        settle_below = optimizer.settle_below or task.goal.below
        if optimizer.schedule == "settle" and self.metrics[task.goal.measure] < settle_below:
            self._set_learning_rate(optimizer.settled_learning_rate)

    def _own(self, sequences: Sequences) -> Sequences:
        """This process's part of a batch, on its device."""
        first = self.fabric.global_rank * self.settings.batch_size
        rows = slice(first, first + self.settings.batch_size)
        return sequences.part(rows, self.fabric.device)

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        """Over the processes."""
        return values if self.fabric.world_size == 1 else cast("torch.Tensor", self.fabric.all_reduce(values))

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes to stop: they must stop after the same update."""
        return wish if self.fabric.world_size == 1 else bool(self._mean(torch.tensor(float(wish))) > 0)

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def _check_finite(self, loss: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        for name, value in ("loss", loss), ("gradient's norm", gradient_norm):
            if not torch.isfinite(value):
                raise NonFiniteError(
                    f"at update {self.update + 1} the {name} is {value.item()}: the last good checkpoint is kept in "
                    f"{self.settings.run_dir}; start again in another --run-dir with a lower "
                    "--optimizer.learning-rate or --optimizer.clip-norm"
                )


def _fabric(settings: Settings) -> Fabric:
    """The devices and processes of a run: one, or those that `torchrun` started."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: torch finds no GPU here; leave --device out to train on the CPU")
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(
        accelerator=settings.device,
        devices=num_here,
        num_nodes=num_processes // num_here,
        strategy="ddp" if num_processes > 1 else "auto",
        precision=settings.precision,
    )
    fabric.launch()
    return fabric


def _optimizer(cell: Cell, settings: OptimizerSettings) -> torch.optim.Optimizer:
    if settings.name == "adam":
        return torch.optim.Adam(
            cell.parameters(),
            lr=settings.learning_rate,
            betas=(settings.momentum, 0.999),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.RMSprop(
        cell.parameters(),
        lr=settings.learning_rate,
        alpha=settings.square_decay,
        momentum=settings.momentum,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        centered=settings.name == "graves-rmsprop",
    )


def _mean_with(decay: float) -> Any:
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]


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
