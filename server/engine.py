"""Engine: the loop that owns one model's device. Schedule, run, hand back.

One thread takes a batch from the scheduler, runs it on the model runner, and reports the messages that have
ended. A message is whole or nothing: it reads the slot its session has and writes another, which the
session takes over only when every turn has succeeded (`sessions.py` does that), so there is nothing to undo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import structlog

from ntm.tensor import Array
from server.errors import OutputNotFiniteError, ServingError, StepFailedError
from server.model_runner import ModelRunner
from server.scheduler import Scheduler

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class Message:
    """T steps of one session, T at least 0, and a look at the state after them if asked for."""

    session_id: str
    first_step: int
    inputs: Array
    """[T, ...input shape]."""
    outputs: Array
    """[T, ...output shape], filled turn by turn."""
    read_slot: int
    """Where the state is; from the first turn on, where this message's own work is."""
    write_slot: int
    wants_state: bool = False
    state: dict[str, Array] | None = None
    """After the last step, by name, if it was asked for."""
    error: ServingError | None = None
    steps_done: int = 0
    is_started: bool = False
    has_ended: bool = False
    """All its turns are done, or one failed."""
    submit_time_s: float = field(default_factory=perf_counter)

    def fail(self, error: ServingError) -> None:
        """End without a result."""
        self.error = error
        self.has_ended = True


@dataclass(frozen=True)
class BatchReport:
    """What one turn of the loop did, for metrics."""

    num_steps: int
    run_time_s: float
    queue_times_s: list[float]
    """For each message that had its first turn."""


class Engine:
    """Runs messages on one model in a thread of its own."""

    def __init__(
        self,
        runner: ModelRunner,
        on_ended: Callable[[list[Message]], None],
        on_batch: Callable[[BatchReport], None] = lambda _: None,
    ) -> None:
        """Start the loop.

        Args:
            runner: the model; the loop's thread owns it from here on.
            on_ended: called in the loop's thread with the messages that a batch ended.
            on_batch: called in the loop's thread after every batch.
        """
        self._runner = runner
        self._on_ended = on_ended
        self._on_batch = on_batch
        self._scheduler: Scheduler[Message] = Scheduler(runner.max_batch_size)
        self._wake = threading.Condition()
        self._num_holds = 0
        self._is_closing = False
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._loop, name=f"engine {runner.model.label}", daemon=True)
        self._thread.start()

    def submit(self, message: Message) -> None:
        """Put a message in line."""
        with self._wake:
            self._scheduler.add(message)
            self._wake.notify()

    def withdraw(self, message: Message) -> bool:
        """Take a message out of line if it has not had a turn; says whether it is out."""
        with self._wake:
            return self._scheduler.withdraw(message)

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Keep the loop from taking its next batch, so that a test decides what is in it."""
        with self._wake:
            self._num_holds += 1
        try:
            yield
        finally:
            with self._wake:
                self._num_holds -= 1
                self._wake.notify()

    def close(self, abandon: bool = False) -> None:
        """End the loop after the messages in line, or, to `abandon` them, after the batch that is running."""
        with self._wake:
            self._is_closing = True
            self._is_abandoned = abandon
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while self._num_holds or not len(self._scheduler) or self._is_abandoned:
                    if self._is_abandoned or (self._is_closing and not self._num_holds):
                        return
                    self._wake.wait()
                batch = self._scheduler.next_batch()
            ended = self._turn(batch)
            unfinished = [message for message in batch if not message.has_ended]
            if unfinished:
                with self._wake:
                    self._scheduler.put_back(unfinished)
            if ended:
                self._on_ended(ended)

    def _turn(self, batch: list[Message]) -> list[Message]:
        """Run one step of each message; returns those that have ended."""
        start_s = perf_counter()
        queue_times_s = [start_s - message.submit_time_s for message in batch if message.steps_done == 0]
        stepping = [message for message in batch if message.steps_done < len(message.inputs)]
        try:
            if stepping:
                self._step(stepping)
            for message in batch:
                message.has_ended = message.has_ended or message.steps_done == len(message.inputs)
            self._look([message for message in batch if message.has_ended and message.wants_state])
        except Exception as error:  # whatever it is, nobody is left waiting
            log.error("a batch failed", model=self._runner.model.label, size=len(batch), exc_info=error)
            for message in batch:
                message.fail(StepFailedError(self._runner.model.label))
        self._report(BatchReport(len(stepping), perf_counter() - start_s, queue_times_s))
        return [message for message in batch if message.has_ended]

    def _report(self, report: BatchReport) -> None:
        try:
            self._on_batch(report)
        except Exception as error:  # metrics must not stop the loop
            log.error("a batch could not be reported", model=self._runner.model.label, exc_info=error)

    def _step(self, batch: list[Message]) -> None:
        """Run one step of each and commit it; a row that fails fails its own message alone."""
        try:
            outputs = self._runner.run(
                np.array([message.read_slot for message in batch]),
                np.concatenate([m.inputs[m.steps_done : m.steps_done + 1] for m in batch]),
            )
        except Exception as error:  # ONNX Runtime raises types of its own for what a model does
            if len(batch) > 1:
                # Nothing was written, so each can be tried alone: one session's inputs must not fail another's step.
                for message in batch:
                    self._step([message])
                return
            message = batch[0]
            log.error(
                "a step failed",
                model=self._runner.model.label,
                session_id=message.session_id,
                step=message.first_step + message.steps_done,
                exc_info=error,
            )
            message.fail(StepFailedError(self._runner.model.label))
            return
        self._runner.commit(np.array([message.write_slot for message in batch]))
        is_finite = np.isfinite(outputs)
        if not is_finite.all():
            for message, row_is_finite in zip(batch, is_finite, strict=True):
                if not row_is_finite.all():
                    step = message.first_step + message.steps_done
                    message.fail(OutputNotFiniteError(self._runner.model.label, step))
        for message, output in zip(batch, outputs, strict=True):
            if message.error is None:
                message.outputs[message.steps_done] = output
                message.steps_done += 1
                message.read_slot = message.write_slot

    def _look(self, wanting: list[Message]) -> None:
        """Give messages that ended well the state they asked for."""
        wanting = [message for message in wanting if message.error is None]
        if not wanting:
            return
        states = self._runner.read(np.array([message.read_slot for message in wanting]))
        for row, message in enumerate(wanting):
            message.state = {name: rows[row] for name, rows in states.items()}
