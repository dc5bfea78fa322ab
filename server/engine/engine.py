"""Engine: the loop that owns one model's device. Schedule, run, hand back.

One thread takes a batch from the scheduler, runs it on the model runner, and reports the messages that have
ended. A batch runs for a quantum of time, and on as long as nobody else waits and no message has ended, each session
in its seat (`model_runner.py` says what that is). A message is whole or nothing for each of its sessions: it begins
from the slot that the session has and ends in another, which the session takes over only when every turn has succeeded
(`sessions.py` does that), so there is nothing to undo.

State is copied as late as possible: what a message leaves in a seat stays there, although it belongs to a slot, until
somebody else needs the seat (`lodgers.py`). Sessions that step again and again in the same company never move, nor do
several companies that take turns, each at a table of its own.

Shapes: S sessions of a message, T steps of it, R rows of a batch (all sessions of its messages), K turns.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from time import perf_counter
from typing import NamedTuple

import numpy as np
import structlog

from ntm.tensor import Array
from server.engine.request import Message
from server.engine.scheduler import Scheduler
from server.errors import EngineFailedError, OutputNotFiniteError, StepFailedError
from server.runtime.runner import ModelRunner, Rows
from server.runtime.state_cache import StateCache

log = structlog.get_logger()


class BatchReport(NamedTuple):
    """What one batch did, for metrics."""

    num_rows: int
    turn_times_s: list[float]
    """For each turn: its inputs to the device, the run, its outputs back."""
    queue_times_s: list[float]
    """For each message that had its first turn."""


# How long a batch runs before those who wait get their turn. A change of the batch costs some Python for each message
# and, where more sessions wait than fit, copies of their state, so it does not come after every turn. The turns of a
# quantum are one run of the device, in which the engine needs no interpreter, and so does not wait for it.
_QUANTUM_S = 5e-3
_MOST_TURNS_AT_ONCE = 32
# About what the event loop needs to answer a message and begin the session's next.
_ANSWER_S = 40e-6

_NOBODY = -1


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
        self._lodgers = StateCache(runner)
        self._on_ended = on_ended
        self._ended: list[Message] = []
        self._on_batch = on_batch
        self._turn_time_s = dict(runner.turn_times_s)
        self._scheduler: Scheduler[Message] = Scheduler(
            runner.max_batch_size, self._turns_in_a_quantum(runner.max_batch_size // 2), self._halves_from()
        )
        self._lock = threading.RLock()  # held by itself, not by way of the condition, whose `with` is Python
        self._wake = threading.Condition(self._lock)
        self._num_holds = 0
        self._tables_by_use = [*range(runner.num_tables)]
        self._in_order = np.arange(runner.max_batch_size)
        self._is_closing = False
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._loop, name=f"engine {runner.model.label}", daemon=True)
        self._thread.start()

    def submit(self, messages: Sequence[Message]) -> None:
        """Put messages in line."""
        with self._lock:
            for message in messages:
                self._scheduler.add(message)
            self._wake.notify()

    def withdraw(self, message: Message) -> bool:
        """Take a message out of line if it has not had a turn; says whether it is out."""
        with self._lock:
            return self._scheduler.withdraw(message)

    def leave_out(self, message: Message, row: int) -> bool:
        """Take one of several sessions out of a message in line if it has not had a turn; says whether it is out."""
        with self._lock:
            if not self._scheduler.shrink(message):
                return False
            message.leave_out(row)
            return True

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Keep the loop from taking its next batch, so that a test decides what is in it."""
        with self._lock:
            self._num_holds += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holds -= 1
                self._wake.notify()

    def close(self, abandon: bool = False) -> None:
        """End the loop after the messages in line, or, to `abandon` them, after the batch that is running."""
        with self._lock:
            self._is_closing = True
            self._is_abandoned = abandon
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        unfinished: list[Message] = []
        while True:
            with self._lock:
                self._scheduler.put_back(unfinished)
                while self._num_holds or not self._scheduler or self._is_abandoned:
                    if self._ended:
                        self._hand_back()
                        continue  # whoever took it may have put something in line
                    if self._is_abandoned or (self._is_closing and not self._num_holds):
                        return
                    self._wake.wait()
                batch = self._scheduler.next_batch()
            self._attempt(batch)
            unfinished = []
            for message in batch:
                (self._ended if message.has_ended else unfinished).append(message)

    def _hand_back(self) -> None:
        """Hand back what has ended: at once when nothing is to be run, else when the next run begins.

        Whoever takes it is then busy with it while the run has no use for the interpreter, and not while the
        next batch is being made ready.
        """
        if self._ended:
            ended, self._ended = self._ended, []
            self._on_ended(ended)

    def _attempt(self, batch: list[Message]) -> None:
        """Run a batch; whatever goes wrong, nobody is left waiting."""
        try:
            self._run(batch)
        except Exception as error:  # ONNX Runtime raises types of its own
            log.error("a batch failed", model=self._runner.model.label, size=len(batch), exc_info=error)
            for message in batch:
                for row in range(message.num_rows):
                    message.errors[row] = EngineFailedError(self._runner.model.label)
                message.has_ended = True

    def _run(self, batch: list[Message]) -> None:
        """Run turns of a batch until somebody else waits or a message has ended."""
        self._load([message for message in batch if message.load_state is not None])
        start_s = perf_counter()
        queue_times_s = [start_s - message.submit_time_s for message in batch if not message.steps_done]
        turn_times_s: list[float] = []
        stepping = [message for message in batch if message.num_left and not message.has_ended]
        num_rows = sum([message.num_rows for message in stepping])
        ended = [] if stepping else batch
        while not ended:
            num_turns = min([message.num_left for message in stepping])
            quantum = self._turns_in_a_quantum(num_rows) if num_turns > 1 else 1
            if num_turns > quantum:
                num_turns = min(num_turns, quantum if self._is_wanted() else _MOST_TURNS_AT_ONCE)
            self._take_turns(stepping, num_turns, quantum, turn_times_s)
            ended = [message for message in batch if message.has_ended or not message.num_left]
            if self._is_wanted():
                break
        for message in ended:
            message.has_ended = True
        self._forget_what_was_before(ended)
        self._look([m for m in ended if m.wants_state and len(m.errors) < m.num_rows])
        self._report(BatchReport(num_rows, turn_times_s, queue_times_s))

    def _load(self, messages: list[Message]) -> None:
        """Put the states that messages bring along into their slots."""
        if not messages:
            return
        slots = _joined([message.slots for message in messages])
        self._lodgers.forget(slots)  # whose they were before has no use for them
        states = [message.load_state for message in messages if message.load_state is not None]
        self._runner.write(
            slots, {name: np.concatenate([state[name] for state in states]) for name in states[0]}
        )
        for message in messages:
            message.load_state = None

    def _turns_in_a_quantum(self, num_rows: int) -> int:
        """A power of two, so that messages of as many steps, or a multiple, that begin together also end together."""
        known = self._turn_time_s  # of the last turn of so many rows
        turn_time_s = known.get(num_rows)
        if turn_time_s is None:
            nearest = min(known, key=lambda other: abs(other - num_rows), default=None)
            turn_time_s = _QUANTUM_S if nearest is None else known[nearest] * max(1, num_rows / nearest)
        return _power_of_two(max(1, min(_MOST_TURNS_AT_ONCE, int(_QUANTUM_S / turn_time_s))))

    def _halves_from(self) -> int | None:
        """From how many turns on two half batches that overlap with their answers are faster than a whole one, if so.

        A run of a half must take as long as the other's answers, and the two together not so much longer than a whole
        one that the pause would be shorter.
        """
        size = self._runner.max_batch_size
        whole_s, half_s = self._turn_time_s.get(size), self._turn_time_s.get(size // 2)
        if whole_s is None or half_s is None:
            return None
        answers_s, num_turns = size // 2 * _ANSWER_S, self._turns_in_a_quantum(size // 2)
        if num_turns * half_s < answers_s or num_turns * (2 * half_s - whole_s) > answers_s:
            return None
        return math.ceil(answers_s / half_s)

    def _is_wanted(self) -> bool:
        """Whether the loop has something else to attend to; a glance, without the lock."""
        return bool(self._scheduler or self._num_holds or self._is_abandoned)

    def _take_turns(
        self, batch: list[Message], num_turns: int, quantum: int, turn_times_s: list[float]
    ) -> None:
        """Run so many turns of a batch, fewer if one fails, or if somebody waits after a quantum of them.

        A session that fails, fails alone.
        """
        table, seats, are_in_order = self._sit(_joined([message.present_slots for message in batch]))
        write_slots = _joined([message.write_slots for message in batch])
        if not are_in_order:
            self._lodgers.forget(write_slots)  # who has a seat lodges nowhere else
        num_rows = len(seats)
        pieces = [m.inputs[:, m.steps_done : m.steps_done + num_turns] for m in batch]
        inputs = (np.concatenate(pieces) if len(pieces) > 1 else pieces[0]).swapaxes(0, 1)
        if not are_in_order:
            together = inputs
            inputs = np.empty_like(together, order="C")
            inputs[:, seats] = together
        inputs = np.ascontiguousarray(inputs)
        num_done = num_failed = 0
        while num_done < num_turns:
            num = _power_of_two(min(quantum, num_turns - num_done)) if self._runner.can_scan else 1
            start_s = perf_counter()
            self._lodgers.make_room_for_run(table, num_rows)
            self._hand_back()
            try:
                outputs = self._run_steps(inputs[num_done : num_done + num], table)
            except Exception:  # ONNX Runtime raises types of its own for what a model does
                num_failed = num
                break
            num_done += num
            self._turn_time_s[num_rows] = turn_time_s = (perf_counter() - start_s) / num
            turn_times_s += [turn_time_s] * num
            self._note(batch, (outputs if are_in_order else outputs[:, seats]).swapaxes(0, 1))
            if num_done < num_turns and num_done % quantum == 0 and self._is_wanted():
                break
        if not num_done:  # nothing is left of those that are new
            are_old = np.repeat([m.steps_done > 0 for m in batch], [m.num_rows for m in batch])
            seats, write_slots = seats[are_old], write_slots[are_old]
        self._lodgers.add(self._runner.seats(table, num_rows)[seats], write_slots)
        for _ in range(num_failed):
            self._take_turn_alone([message for message in batch if not message.has_ended])

    def _run_steps(self, inputs: Array, table: int = 0) -> Array:
        """Run steps [K, R, ...input shape]; returns [K, R, ...output shape]."""
        model = self._runner.model
        steps = self._runner.run(model.inputs.pack({model.inputs.names[0]: inputs}), table)
        return model.outputs.tensor(steps, model.outputs.names[0])

    def _note(self, batch: list[Message], outputs: Array) -> None:
        """Give messages their next outputs, [R, K, ...]; a session whose outputs are not finite has failed."""
        are_finite = np.count_nonzero(np.isfinite(outputs)) == outputs.size
        first_row, num_turns = 0, outputs.shape[1]
        for message in batch:
            its_own = outputs[first_row : first_row + message.num_rows]
            first_row += message.num_rows
            message.outputs[:, message.steps_done : message.steps_done + num_turns] = its_own
            if not are_finite:
                self._fail_not_finite(message, its_own)
            message.go_on(num_turns)

    def _fail_not_finite(self, message: Message, outputs: Array) -> None:
        """Fail the sessions whose next outputs, [S, K, ...], are not finite, each at the first such step."""
        is_finite: Array = np.asarray(np.isfinite(outputs).reshape(*outputs.shape[:2], -1).all(axis=2))
        for row in np.flatnonzero(~is_finite.all(axis=1)).tolist():
            step = int(message.first_steps[row]) + message.steps_done + int(is_finite[row].argmin())
            message.fail(row, OutputNotFiniteError(self._runner.model.label, step))

    def _take_turn_alone(self, batch: list[Message]) -> None:
        """Run the next step of each session by itself: one session's inputs must not fail another's step."""
        self._lodgers.move_out()
        for message in batch:
            step, slots = message.steps_done, message.present_slots
            for row in range(message.num_rows):
                self._runner.move(np.array([slots[row]]), np.array([self._runner.first_seat(0)]))
                try:
                    inputs = np.ascontiguousarray(message.inputs[np.newaxis, row : row + 1, step])
                    outputs = self._run_steps(inputs)
                except Exception as error:  # as above
                    log.error(
                        "a step failed",
                        model=self._runner.model.label,
                        session_id=message.session_ids[row],
                        step=int(message.first_steps[row]) + step,
                        exc_info=error,
                    )
                    message.fail(row, StepFailedError(self._runner.model.label))
                    continue
                message.outputs[row, step] = outputs[0, 0]
                self._runner.move(
                    np.array([self._runner.first_seat(0)]), np.array([message.write_slots[row]])
                )
            self._fail_not_finite(message, message.outputs[:, step : step + 1])
            message.go_on(1)

    def _sit(self, slots: Rows) -> tuple[int, Rows, bool]:
        """Give the states of slots [R] a seat each at one table, so that no seat between them is empty.

        The table is the one where most of them lodge, or, if none does, the one unused for longest. There, whoever
        lodges in one of the first R seats keeps it (one of those that share it), and the others take what is free.

        Returns:
            the table, the seats [R], and whether state i has seat i.
        """
        rows, in_order = self._lodgers.rows_of(slots), self._in_order[: len(slots)]
        table = int(self._runner.tables_of(rows[0]))
        if table >= 0 and not np.count_nonzero(rows != self._runner.seats(table, len(rows))):
            self._note_use(table)
            return table, in_order, True
        tables = self._runner.tables_of(rows)
        counts = np.bincount(tables + 1)[1:]
        table = int(counts.argmax()) if len(counts) else self._tables_by_use[0]
        self._note_use(table)
        first = self._runner.first_seat(table)
        seats = rows - first
        in_seat = np.full(len(slots), _NOBODY)  # by seat: which of the states sits there
        sitting = ((tables == table) & (seats < len(slots))).nonzero()[0]
        in_seat[seats[sitting]] = sitting
        is_free = in_seat == _NOBODY
        if is_free.any():
            is_moving = np.ones(len(slots), bool)
            is_moving[in_seat[~is_free]] = False
            seats[is_moving] = is_free.nonzero()[0]
            self._lodgers.move_in(rows[is_moving], first + seats[is_moving])
        return table, seats, False

    def _note_use(self, table: int) -> None:
        if self._tables_by_use[-1] != table:
            self._tables_by_use.remove(table)
            self._tables_by_use.append(table)

    def _forget_what_was_before(self, ended: list[Message]) -> None:
        """The states that messages began from are nobody's any more, unless they failed or somebody shares them."""
        slots = [
            message.slots
            if not message.errors and not message.shared_slots
            else [
                slot
                for row, slot in enumerate(message.slots)
                if row not in message.errors and slot not in message.shared_slots
            ]
            for message in ended
            if message.steps_done
        ]
        self._lodgers.forget(_joined(slots))

    def _look(self, wanting: list[Message]) -> None:
        """Give messages that ended well the state they asked for."""
        if not wanting:
            return
        slots = _joined([message.present_slots for message in wanting])
        self._lodgers.move_out(slots)
        states = self._runner.read(slots)
        first_row = 0
        for message in wanting:
            rows = slice(first_row, first_row + message.num_rows)
            message.state = {name: values[rows] for name, values in states.items()}
            first_row = rows.stop

    def _report(self, report: BatchReport) -> None:
        try:
            self._on_batch(report)
        except Exception as error:  # metrics must not stop the loop
            log.error("a batch could not be reported", model=self._runner.model.label, exc_info=error)


def _joined(slots: Sequence[Sequence[int] | Rows]) -> Rows:
    if len(slots) == 1:
        return np.asarray(slots[0], np.int64)
    return np.fromiter(chain.from_iterable(slots), np.int64)


def _power_of_two(number: int) -> int:
    """The largest that is not above a number."""
    return 1 << number.bit_length() - 1
