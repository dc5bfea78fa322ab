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
from training.config import OptimizerSettings, Settings, make_cell, size_text, write_settings
from training.errors import CheckpointError, NonFiniteError, RunDirectoryError, SettingsError
from training.evaluate import evaluate, is_mastered, is_solved, total
from training.loggers import make_loggers
from training.losses import Scores, mean
from training.model import Cell, PlainCell, RecurrentLayer, named_tensors
from training.records import METRICS, Records
from training.tasks import Sequences, Size

SETTINGS = "settings.toml"
LOCK = "lock"
# What is there of a run that ended before its first checkpoint.
_BEFORE_THE_FIRST_CHECKPOINT = {LOCK, SETTINGS, METRICS, "tensorboard", "last.tmp"}
_MOST_SKIPPED_IN_A_ROW = 10


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
        NonFiniteError: the loss or a gradient stays no number, or the weights are none; the last good checkpoint is
            kept.
    """
    _check_machine(settings)
    fabric = _fabric(settings)
    is_first = fabric.global_rank == 0
    run_dir = settings.run_dir
    with _locked(run_dir, resume) if is_first else nullcontext(), _stop_signals() as stop:
        run = _Run(settings, command, fabric)
        if not resume:
            run.begin()
        else:
            last = checkpoints.load(run_dir / LAST)
            run.restore(last)
            console.print(f"resuming after update {run.update}")
            _tell_other_versions(last.versions, console)
            if (reason := run.end_reason) is not None:
                console.print(f"there is nothing to do: {reason}", soft_wrap=True)
        if not is_first:
            run.update_until_over(None, None, stop, Console(quiet=True))
            return None
        _tell_what_export_refuses(settings, console)
        is_begun = resume
        try:
            loggers = make_loggers(settings)
            write_settings(settings, run_dir / SETTINGS)
            with Records(run_dir, run.update, loggers) as records, _progress(console) as progress:
                if records.num_missing:
                    console.print(f"the records of {records.num_missing} updates are damaged or missing")
                if not resume:
                    run.save_checkpoint(LAST, records)
                    is_begun = True  # From here on there is a run to resume, whatever happens.
                run.update_until_over(records, progress, stop, console)
                run.save_checkpoint(LAST, records)
        except OSError as error:
            what_now = (
                "the last good checkpoint is kept; make room and --resume"
                if is_begun
                else "make room and start the run again"
            )
            raise RunDirectoryError(f"{run_dir} cannot be written to ({error}): {what_now}") from None
        if (reason := run.end_reason) is None:
            return stop.signal
        if run.metrics and math.isinf(run.best_score):
            raise NonFiniteError(
                f"the run in {run_dir} is over, and no evaluation found answers that are finite numbers: start another "
                "with a lower --optimizer.learning-rate"
            )
        console.print(f"over: {reason}", soft_wrap=True)
        return None


def end_reason(settings: Settings, update: int, cpu_seconds: float, best_score: float) -> str | None:
    """Why a run is over, and how to go further; None while it is not."""
    limit, enough = settings.cpu_minutes, settings.evaluation.enough
    if update >= settings.num_updates:
        return (
            f"all {settings.num_updates} updates are made; --resume with a greater --num-updates goes further"
        )
    if limit is not None and cpu_seconds >= 60 * limit:
        return f"{limit:g} minutes of processor time are used up; --resume with a greater --cpu-minutes goes further"
    if enough is not None and best_score <= enough:
        return (
            f"the best model scores {best_score:g}, and {enough:g} is enough; --resume with a lesser "
            "--evaluation.enough goes further"
        )
    return None


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
        self.learning_rate, self.attempt_began = settings.optimizer.learning_rate, 0
        # From the smallest on: that many of them are open.
        self.sizes = sorted(settings.task.sizes(), key=lambda size: (math.prod(size), size))
        self.num_sizes = settings.curriculum.first_sizes or len(self.sizes)
        self.update, self.metrics, self.best_score = 0, Scores(), math.inf
        self.solved: dict[str, float] = {}
        self.num_diverged, self.num_skipped, self.num_skipped_in_a_row = 0, 0, 0
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
    def end_reason(self) -> str | None:
        """See the function."""
        return end_reason(self.settings, self.update, self.cpu_seconds, self.best_score)

    def begin(self) -> None:
        """Take the weights of the model that the settings name, if they do."""
        path = self.settings.init_from
        if path is not None:
            weights = _weights_of(path, self.settings)
            for cell in (self.cell, self.averaged):
                checkpoints.load_weights(cell, weights)

    def restore(self, last: Checkpoint) -> None:
        """Go on where a checkpoint stands, with steps no larger than the settings now say."""
        checkpoints.load_weights(self.cell, last.cell)
        checkpoints.load_weights(self.averaged, last.averaged)
        try:
            self.optimizer.load_state_dict(last.optimizer)
            _check_optimizer_state(self.optimizer, self.settings.optimizer)
            torch.set_rng_state(last.random_state)
            self.sequence_generator.set_state(last.sequences_state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.settings.run_dir / LAST} holds a state of the optimiser or of a generator that does not fit "
                f"({error}): start another run"
            ) from None
        self.learning_rate = last.learning_rate
        if self.settings.optimizer.learning_rate != last.settings["optimizer"]["learning_rate"]:
            self.learning_rate = min(self.learning_rate, self.settings.optimizer.learning_rate)
        self.num_sizes, self.attempt_began = last.num_sizes, last.attempt_began
        if self._average is not None:
            self._average.n_averaged.fill_(last.num_averaged)
        self.command, self.update = last.command, last.update
        self.metrics, self.best_score, self.solved = last.metrics, last.best_score, last.solved
        self.num_diverged, self.num_skipped = last.num_diverged, last.num_skipped
        self.num_skipped_in_a_row = last.num_skipped_in_a_row
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
                learning_rate=self.learning_rate,
                num_sizes=self.num_sizes,
                attempt_began=self.attempt_began,
                num_averaged=0 if self._average is None else int(self._average.n_averaged),
                num_diverged=self.num_diverged,
                num_skipped=self.num_skipped,
                num_skipped_in_a_row=self.num_skipped_in_a_row,
                versions=checkpoints.versions(),
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
        while not self._agreed(self.end_reason is not None or stop.signal is not None):
            # Here and not after the update before: a run that ended there and is resumed must not do without.
            record = {"restarted": 1.0} if self._is_restart_due else {}
            if record:
                console.print(f"after update {self.update} the run begins again with other weights")
                self._restart()
            record |= self._step(console)
            if self.update % settings.evaluation.every_updates == 0 or self.update == settings.num_updates:
                record |= self._evaluate(records, console)
            if records is None or progress is None:
                continue
            records.add(self.update, record)
            # What diverges is not what to go on from.
            is_good = self.num_skipped_in_a_row == 0 and checkpoints.is_finite(self.cell.state_dict())
            if self.update % settings.checkpoint_every_updates == 0 and is_good:
                self.save_checkpoint(LAST, records)
            rate = record["sequences"] / record["seconds"]
            error = settings.task.loss.error_name
            shown = f"loss {record['loss']:.4f}  {error.replace('_', ' ')} {record[f'{error}_in_training']:6.2f}  "
            progress.update(bar, completed=self.update, shown=f"{shown}{rate:4.0f} sequences/s")
        if progress is not None and self.end_reason is not None:
            progress.update(bar, total=self.update)  # No time is left, also where updates are.

    def _step(self, console: Console) -> dict[str, float]:
        """One update, or none where it would not be finite; returns what is recorded of it."""
        settings, fabric = self.settings, self.fabric
        batch_size = settings.batch_size * fabric.world_size
        task = settings.task
        drawn = task.check(self._draw(batch_size), batch_size)
        sequences, targets, mask = self._own(drawn), drawn.targets, drawn.mask
        answers = self.layer(sequences.inputs, self._start())[0][-len(targets) :].float()
        # An answer weighs as much in whichever process it is: their means are averaged.
        num_counted = None if mask is None else float(mask.sum()) / fabric.world_size
        loss = mean(task.loss.costs(answers, sequences.targets), sequences.mask, num_counted)

        self.optimizer.zero_grad()
        fabric.backward(loss)
        norm = self._clip_gradients()
        learning_rate = self._scheduled_learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.update += 1
        if self._agreed(not math.isfinite(norm) or not bool(loss.isfinite())):
            restarted = self._leave_out(loss.item(), norm, console)
        else:
            restarted = False
            self.num_skipped_in_a_row = 0
            self.optimizer.step()
            if self._average is not None:
                self._average.update_parameters(self.cell)

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
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            **({"open_sizes": self.num_sizes} if settings.curriculum.first_sizes else {}),
            **({"restarted": 1.0} if restarted else {}),
            **({"skipped_updates": self.num_skipped} if self.num_skipped else {}),
            **({"diverged_attempts": self.num_diverged} if self.num_diverged else {}),
        }

    def _draw(self, batch_size: int) -> Sequences:
        """Sequences of one of the sizes that are open or, where sizes are mixed, each of one of them."""
        task, generator = self.settings.task, self.sequence_generator
        if self.settings.mix_sizes:
            return task.draw_mixed([self._draw_size() for _ in range(batch_size)], generator)
        return task.draw_for_training(batch_size, self._draw_size(), generator)

    def _draw_size(self) -> Size:
        if self.num_sizes == len(self.sizes):
            return self.settings.task.draw_size(self.sequence_generator)
        return self.sizes[int(torch.randint(self.num_sizes, (), generator=self.sequence_generator))]

    def _scheduled_learning_rate(self) -> float:
        """Of the next update."""
        optimizer, done = self.settings.optimizer, self.update / self.settings.num_updates
        factors = {"settle": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        warm = (self.update + 1 - self.attempt_began) / max(1, optimizer.warmup_updates)
        return self.learning_rate * factors[optimizer.schedule] * min(1.0, warm)

    def _clip_gradients(self) -> float:
        """Scale the gradients down to the norm that the settings allow; returns the norm that they had."""
        weights, most = list(self.cell.parameters()), self.settings.optimizer.clip_norm
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(weights, most, norm)
            return float(norm)
        # The squares of finite numbers can be infinite in float32, not in float64.
        norm = torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients])
        if norm.isfinite():
            for gradient in gradients:
                gradient.copy_(gradient.double() * (most / norm))
        return float(norm)

    def _leave_out(self, loss: float, norm: float, console: Console) -> bool:
        """Begin again with other weights where the run does so anyway, else skip the update; whether it began again.

        Raises:
            NonFiniteError: it is not the first that was skipped, but one of many in a row.
        """
        name, value = ("gradient's norm", norm) if math.isfinite(loss) else ("loss", loss)
        problem = f"at update {self.update} the {name} is {value}"
        if self.settings.restart_every_updates is not None:
            self.num_diverged += 1
            console.print(
                f"{problem}: the run begins again with other weights, {self.num_diverged} times so far for this reason",
                soft_wrap=True,
            )
            self._restart()
            return True
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        console.print(f"{problem}: the update is skipped", soft_wrap=True)
        if self.num_skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{problem}, and none of {_MOST_SKIPPED_IN_A_ROW} updates could be made: the last good checkpoint is "
                f"kept in {self.settings.run_dir}; --resume with a lower --optimizer.learning-rate, or, if that fails "
                "as well, start again in another --run-dir with a lower one or a lower --optimizer.clip-norm"
            )
        return False

    def _start(self) -> Any:
        """Where the sequences of an update start, if not where those of the model do: see `settled_memory_rows`."""
        rows = self.settings.settled_memory_rows
        if not rows or not self.solved or isinstance(self.cell, PlainCell):
            return None
        drawn = rows[int(torch.randint(len(rows), (), generator=self.sequence_generator))]
        return self.cell.initial_state(self.settings.batch_size, drawn)

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
            self._open_sizes(console)
        # Of two that do equally well the later one is surer of itself.
        score = total(self.metrics, settings.task)
        if math.isfinite(score) and score <= self.best_score:
            self.best_score = score
            if records is not None:
                self.save_checkpoint(BEST, records)
        return self.metrics

    @property
    def _is_restart_due(self) -> bool:
        restart = self.settings.restart_every_updates
        return restart is not None and self.update > 0 and self.update % restart == 0

    def _restart(self) -> None:
        """Begin again with fresh weights; everything else goes on."""
        fresh = make_cell(self.settings)
        for cell in (self.cell, self.averaged):
            cell.load_state_dict(fresh.state_dict())
        self.begin()
        if self._average is not None:
            self._average.n_averaged.zero_()
        self.optimizer.state.clear()
        self.learning_rate, self.attempt_began = self.settings.optimizer.learning_rate, self.update
        self.num_sizes = self.settings.curriculum.first_sizes or len(self.sizes)

    def _open_sizes(self, console: Console) -> None:
        """Go on with more sizes of training once the largest of them is mastered."""
        if self.num_sizes == len(self.sizes):
            return
        is_first = self.fabric.global_rank == 0
        largest = self.sizes[self.num_sizes - 1]
        if self._agreed(is_first and is_mastered(self.averaged, self.settings, largest)):
            self.num_sizes = min(len(self.sizes), self.num_sizes + self.settings.curriculum.add_sizes)
            opened = size_text(self.sizes[self.num_sizes - 1])
            console.print(f"size {size_text(largest)} is mastered: training goes up to {opened}")

    def _note_solved_and_lower_rate(self) -> None:
        """Note when the task is first solved, and from where the schedule says on take smaller steps."""
        task, optimizer = self.settings.task, self.settings.optimizer
        if not self.solved and is_solved(self.metrics, task):
            self.solved = {"update": self.update, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        settle_below = optimizer.settle_below or task.goal.below
        if optimizer.schedule == "settle" and self.metrics[task.goal.measure] < settle_below:
            self.learning_rate = optimizer.settled_learning_rate

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


def _weights_of(path: Path, settings: Settings) -> dict[str, Any]:
    """The best weights of a run, or those of a checkpoint file, for a machine with as many rows as the settings say."""
    content = checkpoints.load(path / BEST if path.is_dir() else path)
    rows, own = content.settings["model"].get("memory_rows"), settings.model.memory_rows
    if settings.model.architecture == "ntm" and rows != own:
        return checkpoints.restore_cell(content, own)[0].state_dict()
    return content.averaged


def _check_machine(settings: Settings) -> None:
    """Refuse what this machine cannot hold or do, before anything is made of it."""
    num_cores = os.cpu_count() or 1
    if settings.num_threads > num_cores:
        raise SettingsError(
            f"num_threads {settings.num_threads} is more than the {num_cores} processor cores of this machine"
        )
    if settings.device != "cpu":
        return
    needed = _least_bytes(settings)
    there_is = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there_is:
        raise SettingsError(
            f"a step needs at least {needed / 2**30:.3g} GiB of memory, this machine has {there_is / 2**30:.3g}: make "
            "batch_size, the model's sizes or the task's smaller"
        )


def _least_bytes(settings: Settings) -> float:
    """Of the weights with their gradients, running mean and moments, and of a batch's state before and after a step."""
    try:
        with torch.device("meta"):  # Shapes alone.
            cell = make_cell(settings)
            weights = sum(weight.numel() for weight in cell.parameters())
            state = sum(tensor.numel() for tensor in named_tensors(cell.initial_state(1)).values())
    except (OverflowError, RuntimeError, TypeError):  # More numbers than can be counted.
        return math.inf
    return 4.0 * (4 * weights + 2 * settings.batch_size * state)


def _tell_what_export_refuses(settings: Settings, console: Console) -> None:
    rows = settings.model.memory_rows
    if settings.model.architecture != "plain" and rows % 4:
        console.print(
            f"note: export will refuse this model, whose memory_rows {rows} is no multiple of 4: batches would not be "
            "exact to the bit",
            soft_wrap=True,
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
    try:
        if resume and not run_dir.is_dir():
            raise RunDirectoryError(
                f"there is no run in {run_dir} to resume: leave out --resume to start one"
            )
        if run_dir.exists() and not run_dir.is_dir():
            raise RunDirectoryError(f"{run_dir} is a file: give another --run-dir")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("w")
    except OSError as error:
        raise RunDirectoryError(
            f"{run_dir} cannot be a run directory ({error.strerror or error}): give another --run-dir"
        ) from None
    with lock:
        _lock(lock, run_dir)
        if not resume:
            _check_is_free(run_dir)
        yield run_dir


def _check_is_free(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    if LAST in names:
        raise RunDirectoryError(
            f"{run_dir} holds a run: give another --run-dir, or go on there with --resume, further than it was to go "
            "with a greater --num-updates"
        )
    metrics = run_dir / METRICS
    if names - _BEFORE_THE_FIRST_CHECKPOINT or (metrics.exists() and metrics.stat().st_size):
        raise RunDirectoryError(f"{run_dir} holds other files than a new run: give another --run-dir")


def _tell_other_versions(versions: dict[str, str], console: Console) -> None:
    now = checkpoints.versions()
    others = [
        f"{name} {now[name]} instead of {versions.get(name)}"
        for name in now
        if now[name] != versions.get(name)
    ]
    if others:
        console.print(
            f"the run goes on with {', '.join(others)}, and may differ from what it would have been",
            soft_wrap=True,
        )


def _check_optimizer_state(optimizer: Any, settings: OptimizerSettings) -> None:
    """Raise ValueError unless every weight that has been stepped has the moments that its optimiser needs."""
    moments = {"exp_avg", "exp_avg_sq"}
    if settings.name != "adam":
        moments = {"square_avg"} | ({"momentum_buffer"} if settings.momentum else set())
        moments |= {"grad_avg"} if settings.name == "graves-rmsprop" else set()
    for weight, state in optimizer.state.items():
        if not isinstance(weight, torch.Tensor) or state.keys() != {"step", *moments}:
            raise ValueError(
                f"there are {', '.join(map(str, state))}, not step, {', '.join(sorted(moments))}"
            )
        for name in moments:
            if state[name].shape != weight.shape:
                raise ValueError(f"{name} is {list(state[name].shape)}, not {list(weight.shape)}")


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
