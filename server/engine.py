"""Engine: the loop that owns one model's device. Schedule, run, hand back.

One thread takes a batch from the scheduler, runs it on the model runner, and reports the messages that have
ended. As long as nobody else waits and no message has ended, the same batch goes on from turn to turn, each message
in its seat (`model_runner.py` says what that is). A message is whole or nothing: it begins from the slot its session
has and ends in another, which the session takes over only when every turn has succeeded (`sessions.py` does that), so
there is nothing to undo.

Shapes: B batch, K turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

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
    slot: int
    """Where the state is when the message has no seat: the session's slot, or `write_slot` after the first turn."""
    write_slot: int
    """Where the state goes in the end, and whenever the message must wait for its next turn."""
    wants_state: bool = False
    on_ended: Callable[[Message], None] | None = None
    """What whoever submitted it wants done then; the engine only carries it."""
    seat: int | None = None
    state: dict[str, Array] | None = None
    """After the last step, by name, if it was asked for."""
    error: ServingError | None = None
    steps_done: int = 0
    is_started: bool = False
    has_ended: bool = False
    """All its turns are done, or one failed."""
    submit_time_s: float = field(default_factory=perf_counter)

    @property
    def num_left(self) -> int:
        """Steps that are not done."""
        return len(self.inputs) - self.steps_done

    def fail(self, error: ServingError) -> None:
        """End without a result."""
        self.error = error
        self.has_ended = True


@dataclass(frozen=True)
class BatchReport:
    """What one batch did, for metrics."""

    size: int
    turn_times_s: list[float]
    """For each turn: its inputs to the device, the run, its outputs back."""
    queue_times_s: list[float]
    """For each message that had its first turn."""


# Turns that are prepared in one piece at most; a newcomer makes what is prepared beyond the next turn useless.
_MOST_TURNS_AT_ONCE = 32


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

    def submit(self, messages: Sequence[Message]) -> None:
        """Put messages in line."""
        with self._wake:
            for message in messages:
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
        unfinished: list[Message] = []
        while True:
            with self._wake:
                self._scheduler.put_back(unfinished)
                while self._num_holds or not len(self._scheduler) or self._is_abandoned:
                    if self._is_abandoned or (self._is_closing and not self._num_holds):
                        return
                    self._wake.wait()
                batch = self._scheduler.next_batch()
                must_wait = unfinished if len(self._scheduler) else []
            self._attempt(self._stand, _without(must_wait, batch))
            self._attempt(self._run, batch)
            ended = [message for message in batch if message.has_ended]
            unfinished = [message for message in batch if not message.has_ended]
            if ended:
                self._on_ended(ended)

    def _attempt(self, work: Callable[[list[Message]], None], messages: list[Message]) -> None:
        """Do something for some messages; whatever goes wrong, nobody is left waiting."""
        try:
            work(messages)
        except Exception as error:  # ONNX Runtime raises types of its own
            log.error("a batch failed", model=self._runner.model.label, size=len(messages), exc_info=error)
            for message in messages:
                message.fail(StepFailedError(self._runner.model.label))

    def _run(self, batch: list[Message]) -> None:
        """Run turns of a batch until somebody else waits or a message has ended."""
        start_s = perf_counter()
        queue_times_s = [start_s - message.submit_time_s for message in batch if message.steps_done == 0]
        turn_times_s: list[float] = []
        stepping = [message for message in batch if message.num_left and not message.has_ended]
        # Each piece is twice the last: one that a newcomer is likely to cut short is small.
        num_turns = 1
        while stepping:
            num_turns = min(num_turns, _MOST_TURNS_AT_ONCE, *(message.num_left for message in stepping))
            self._take_turns(stepping, num_turns, turn_times_s)
            if any(message.has_ended or not message.num_left for message in stepping) or self._is_wanted():
                break
            num_turns *= 2
        for message in batch:
            message.has_ended = message.has_ended or not message.num_left
        ended = [message for message in batch if message.has_ended and message.error is None]
        self._stand([message for message in ended if message.seat is not None])
        self._look([message for message in ended if message.wants_state])
        self._report(BatchReport(len(stepping), turn_times_s, queue_times_s))

    def _is_wanted(self) -> bool:
        """Whether the loop has something else to attend to; a glance, without the lock."""
        return bool(len(self._scheduler) or self._num_holds or self._is_abandoned)

    def _take_turns(self, batch: list[Message], num_turns: int, turn_times_s: list[float]) -> None:
        """Run up to so many turns of a batch, at least one; a message that fails, fails alone."""
        batch = self._sit(batch)
        size = len(batch)
        pieces = [m.inputs[m.steps_done : m.steps_done + num_turns] for m in batch]
        inputs = np.concatenate(pieces).reshape(size, num_turns, *pieces[0].shape[1:])
        inputs = np.ascontiguousarray(inputs.swapaxes(0, 1))
        outputs = np.empty((num_turns, size, *batch[0].outputs.shape[1:]), batch[0].outputs.dtype)
        num_done, failed = 0, None
        while num_done < num_turns and not (num_done and self._is_wanted()):
            start_s = perf_counter()
            try:
                outputs[num_done] = self._runner.run(inputs[num_done])
            except Exception as error:  # ONNX Runtime raises types of its own for what a model does
                failed = error
                break
            num_done += 1
            turn_times_s.append(perf_counter() - start_s)
        if not np.isfinite(outputs[:num_done]).all():
            self._fail_not_finite(batch, outputs[:num_done])
        for index, message in enumerate(batch):
            if message.error is None:
                message.outputs[message.steps_done : message.steps_done + num_done] = outputs[
                    :num_done, index
                ]
                message.steps_done += num_done
        if failed is not None:
            self._take_turn_alone([message for message in batch if message.error is None], failed)

    def _fail_not_finite(self, batch: list[Message], outputs: Array) -> None:
        """Fail the messages whose outputs, [K, B, ...], are not finite, each at the first such step."""
        is_finite: Array = np.asarray(np.isfinite(outputs).reshape(*outputs.shape[:2], -1).all(axis=2))
        for index, message in enumerate(batch):
            if not is_finite[:, index].all():
                step = message.first_step + message.steps_done + int(is_finite[:, index].argmin())
                message.fail(OutputNotFiniteError(self._runner.model.label, step))

    def _take_turn_alone(self, batch: list[Message], error: Exception) -> None:
        """Run the next step of each by itself: one session's inputs must not fail another's step."""
        if len(batch) > 1:
            self._stand(batch)
            for message in batch:
                self._take_turns([message], 1, [])
                if message.error is None:
                    self._stand([message])
            return
        [message] = batch
        log.error(
            "a step failed",
            model=self._runner.model.label,
            session_id=message.session_id,
            step=message.first_step + message.steps_done,
            exc_info=error,
        )
        message.fail(StepFailedError(self._runner.model.label))

    def _sit(self, batch: list[Message]) -> list[Message]:
        """Give every message of a batch a seat, so that no seat between them is empty; returns them in that order.

        Those who have one keep it if they can, and the others take what is free: few move from turn to turn.
        """
        seated: list[Message | None] = [None] * len(batch)
        moving = []
        for message in batch:
            if message.seat is not None and message.seat < len(batch):
                seated[message.seat] = message
            else:
                moving.append(message)
        if moving:
            first = self._runner.first_seat
            sources = [m.slot if m.seat is None else first + m.seat for m in moving]
            free = [seat for seat, message in enumerate(seated) if message is None]
            self._runner.move(np.array(sources), np.array(free) + first)
            for message, seat in zip(moving, free, strict=True):
                seated[seat], message.seat = message, seat
        return cast(list[Message], seated)

    def _stand(self, messages: list[Message]) -> None:
        """Put the state of messages into their slots, and free their seats."""
        if not messages:
            return
        first = self._runner.first_seat
        seats, slots = zip(*((cast(int, m.seat), m.write_slot) for m in messages), strict=True)
        self._runner.move(np.array(seats) + first, np.array(slots))
        for message in messages:
            message.seat, message.slot = None, message.write_slot

    def _look(self, wanting: list[Message]) -> None:
        """Give messages that ended well the state they asked for."""
        if not wanting:
            return
        states = self._runner.read(np.array([message.slot for message in wanting]))
        for index, message in enumerate(wanting):
            message.state = {name: values[index] for name, values in states.items()}

    def _report(self, report: BatchReport) -> None:
        try:
            self._on_batch(report)
        except Exception as error:  # metrics must not stop the loop
            log.error("a batch could not be reported", model=self._runner.model.label, exc_info=error)


def _without(messages: list[Message], others: list[Message]) -> list[Message]:
    taken = set(others)
    return [message for message in messages if message not in taken]
