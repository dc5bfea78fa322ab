"""Engine: the loop that owns one model's device. Schedule, run, hand back.

One thread takes a batch from the scheduler, runs it on the model runner, and hands back the requests that have ended. A
batch runs for a quantum of time, and on as long as nobody else waits and no request has ended. A request is whole or
nothing for each of its sessions: it begins from the slot that the session has and ends in another, which the session
takes over only when every turn has succeeded, so there is nothing to undo.

State is copied as late as possible: what a run leaves in a batch row stays there, although it belongs to a slot, until
somebody else needs the row (`state_cache.py`). Sessions that step again and again in the same batch are never copied,
nor are several batches that take turns, each in a bank of its own.

Shapes: S sessions of a request, T steps of it, R rows of a batch (all sessions of its requests), K turns.
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
from server.engine.request import EngineRequest
from server.engine.run_limit import RunLimit
from server.engine.scheduler import Scheduler
from server.errors import (
    EngineFailedError,
    OutputNotFiniteError,
    QueueTooSlowError,
    StepFailedError,
    StepTimedOutError,
)
from server.model.layout import Steps
from server.runtime.runner import INITIAL_SLOT, ModelRunner, Rows
from server.runtime.state_cache import StateCache
from server.wait_limit import WaitLimit

log = structlog.get_logger()


class BatchReport(NamedTuple):
    """What one batch did, for metrics."""

    num_rows: int
    turn_times_s: list[float]
    """For each turn: its inputs to the device, the run, its outputs back."""
    queue_times_s: list[float]
    """For each request that had its first turn."""


# How long a batch runs before those who wait get their turn. A change of the batch costs some Python for each request
# and, where more sessions wait than fit, copies of their state, so it does not come after every turn. The turns of a
# quantum are one run of the device, in which the engine needs no interpreter, and so does not wait for it.
_QUANTUM_S = 5e-3
_MOST_TURNS_AT_ONCE = 32

_NOBODY = -1


def engine_thread_name(model: str) -> str:
    """What the thread of a model's engine is called."""
    return f"engine {model}"


OnEnded = Callable[[list[EngineRequest]], None]


class Engine:
    """Runs requests on one model in a thread of its own."""

    def __init__(
        self,
        runner: ModelRunner,
        on_ended: OnEnded,
        on_batch: Callable[[BatchReport], None] = lambda _: None,
        step_timeout_s: float = 30.0,
        max_queue_wait_s: float = math.inf,
    ) -> None:
        """Start the loop.

        Args:
            runner: the model; the loop's thread owns it from here on.
            on_ended: called in the loop's thread with the requests that a batch ended.
            on_batch: called in the loop's thread after every batch.
            step_timeout_s: seconds that a run may take.
            max_queue_wait_s: seconds that a caller's request may wait for its first turn where requests keep coming
                faster than they run; one that has waited longer is then not run.
        """
        self._runner = runner
        self._limit = RunLimit(runner.model.label, step_timeout_s, runner.interrupt)
        self._step_timeout_s = step_timeout_s
        self.wait_limit = WaitLimit(max_queue_wait_s)
        """Of the waits for a first turn."""
        self._cache = StateCache(runner)
        self._on_ended = on_ended
        self._ended: list[EngineRequest] = []
        self._on_batch = on_batch
        self._turn_time_s: dict[int, float] = {}
        """How long the last turn of so many rows took."""
        self._scheduler: Scheduler[EngineRequest] = Scheduler(runner.max_batch_size, _MOST_TURNS_AT_ONCE)
        self._lock = threading.RLock()  # held by itself, not by way of the condition, whose `with` is Python
        self._wake = threading.Condition(self._lock)
        self._num_holds = 0
        self._banks_by_use = [*range(runner.num_banks)]
        self._in_order = np.arange(runner.max_batch_size)
        self._is_closing = False
        self._is_abandoned = False
        self._thread = threading.Thread(
            target=self._loop, name=engine_thread_name(runner.model.label), daemon=True
        )
        self._thread.start()

    @property
    def thread(self) -> threading.Thread:
        """The loop's."""
        return self._thread

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Enqueue requests."""
        now_s = perf_counter()
        with self._lock:
            for request in requests:
                request.enqueue_time_s = now_s
                self._scheduler.enqueue(request)
            self._wake.notify()

    def cancel(self, request: EngineRequest) -> bool:
        """Take a request out of the queue if it has not had a turn; says whether it is out."""
        with self._lock:
            return self._scheduler.cancel(request)

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
        """End the loop after the requests in the queue, or, to `abandon` them, after the batch that is running."""
        with self._lock:
            self._is_closing = True
            self._is_abandoned = abandon
            self._wake.notify()
        self._thread.join()
        self._limit.close()

    def _loop(self) -> None:
        unfinished: list[EngineRequest] = []
        while (batch := self._next_batch(unfinished)) is not None:
            late = self._take_late(batch)
            if len(late) < len(batch):
                self._attempt([request for request in batch if not request.has_ended] if late else batch)
            unfinished = []
            for request in batch:
                (self._ended if request.has_ended else unfinished).append(request)

    def _next_batch(self, unfinished: list[EngineRequest]) -> list[EngineRequest] | None:
        """Wait for the next batch; requests that need more turns go to the end of their queues. None at the end."""
        with self._lock:
            for request in unfinished:
                self._scheduler.enqueue(request)
            while self._num_holds or not self._scheduler or self._is_abandoned:
                self.wait_limit.clear()
                if self._ended:
                    self._hand_back()
                    continue  # whoever took it may have enqueued something
                if self._is_abandoned or (self._is_closing and not self._num_holds):
                    return None
                self._wake.wait()
            return self._scheduler.next_batch()

    def _take_late(self, batch: list[EngineRequest]) -> list[EngineRequest]:
        """End the requests of a batch that have waited too long for their first turn; returns these."""
        now_s, limit_s = perf_counter(), self.wait_limit.limit_s
        since_s = [request.enqueue_time_s for request in batch if not request.steps_done]
        if not since_s:  # all of them go on
            return []
        self.wait_limit.note(min(since_s), now_s)
        if not self.wait_limit.is_reached:
            return []
        late = [
            request
            for request in batch
            if request.is_from_caller and not request.steps_done and now_s - request.enqueue_time_s > limit_s
        ]
        error = QueueTooSlowError(self._runner.model.label, limit_s)
        for request in late:
            request.errors = dict.fromkeys(range(request.num_rows), error)
            request.has_ended = True
        return late

    def _hand_back(self) -> None:
        """Hand back what has ended: at once when nothing is to be run, else when the next run begins.

        Whoever takes it is then busy with it while the run has no use for the interpreter, and not while the
        next batch is being made ready.
        """
        if self._ended:
            ended, self._ended = self._ended, []
            self._on_ended(ended)

    def _attempt(self, batch: list[EngineRequest]) -> None:
        """Run a batch; whatever goes wrong, nobody is left waiting."""
        try:
            self._run(batch)
        except Exception as error:  # ONNX Runtime raises types of its own
            log.error("a batch failed", model=self._runner.model.label, size=len(batch), exc_info=error)
            for request in batch:
                for row in range(request.num_rows):
                    request.errors[row] = EngineFailedError(self._runner.model.label)
                request.has_ended = True

    def _run(self, batch: list[EngineRequest]) -> None:
        """Run turns of a batch until somebody else waits or a request has ended."""
        self._load([request for request in batch if request.load_state is not None])
        start_s = perf_counter()
        queue_times_s = []
        for request in batch:
            if not request.steps_done:
                request.start_time_s = start_s
                queue_times_s.append(start_s - request.submit_time_s)
        turn_times_s: list[float] = []
        stepping = [request for request in batch if request.num_left and not request.has_ended]
        num_rows = sum([request.num_rows for request in stepping])
        ended = [] if stepping else batch
        while not ended:
            num_turns = min([request.num_left for request in stepping])
            tracing = [request for request in stepping if request.trace_names]
            if tracing:
                num_turns = 1
            quantum = self._turns_in_a_quantum(num_rows) if num_turns > 1 else 1
            if num_turns > quantum:
                num_turns = min(num_turns, quantum if self._is_wanted() else _MOST_TURNS_AT_ONCE)
            self._take_turns(stepping, num_turns, quantum, turn_times_s)
            if tracing:
                self._read_traces(tracing)
            ended = [request for request in batch if request.has_ended or not request.num_left]
            if self._is_wanted():
                break
        end_s = perf_counter()
        for request in ended:
            request.has_ended = True
            request.end_time_s = end_s
        self._forget_what_was_before(ended)
        self._read(
            [request for request in ended if request.reads_state and len(request.errors) < request.num_rows]
        )
        self._report(BatchReport(num_rows, turn_times_s, queue_times_s))

    def _load(self, requests: list[EngineRequest]) -> None:
        """Put the states that requests bring along into their slots."""
        if not requests:
            return
        slots = _joined([request.slots for request in requests])
        self._cache.forget(slots)  # whose they were before has no use for them
        states = [request.load_state for request in requests if request.load_state is not None]
        self._runner.write(
            slots, {name: np.concatenate([state[name] for state in states]) for name in states[0]}
        )
        for request in requests:
            request.load_state = None

    def _turns_in_a_quantum(self, num_rows: int) -> int:
        """A power of two, so that requests of as many steps, or a multiple, that begin together also end together."""
        known = self._turn_time_s
        turn_time_s = known.get(num_rows)
        if turn_time_s is None:
            nearest = min(known, key=lambda other: abs(other - num_rows), default=None)
            turn_time_s = _QUANTUM_S if nearest is None else known[nearest] * max(1, num_rows / nearest)
        return _power_of_two(max(1, min(_MOST_TURNS_AT_ONCE, int(_QUANTUM_S / turn_time_s))))

    def _is_wanted(self) -> bool:
        """Whether the loop has something else to attend to; a glance, without the lock."""
        return bool(self._scheduler or self._num_holds or self._is_abandoned)

    def _take_turns(
        self, batch: list[EngineRequest], num_turns: int, quantum: int, turn_times_s: list[float]
    ) -> None:
        """Run so many turns of a batch, fewer if one fails, or if somebody waits after a quantum of them.

        A session that fails, fails alone.
        """
        bank, rows, are_in_order = self._place(_joined([request.present_slots for request in batch]))
        write_slots = _joined([request.write_slots for request in batch])
        if not are_in_order:
            self._cache.forget(write_slots)  # whose state is in a batch row has it nowhere else
        num_rows = len(rows)
        initial_rows = self._initial_rows(batch, rows)
        pieces = [r.inputs[:, r.steps_done : r.steps_done + num_turns] for r in batch]
        together = (np.concatenate(pieces) if len(pieces) > 1 else pieces[0]).swapaxes(0, 1)
        if are_in_order:
            inputs = np.ascontiguousarray(together)
        else:
            inputs = np.empty(together.shape, together.dtype)
            inputs[:, rows] = together
        num_done = num_failed = 0
        while num_done < num_turns:
            num = _power_of_two(min(quantum, num_turns - num_done)) if self._runner.can_scan else 1
            start_s = perf_counter()
            self._cache.make_room_for_run(bank, num_rows)
            self._hand_back()
            try:
                outputs = self._run_limited(inputs[num_done : num_done + num], bank, initial_rows)
            except StepTimedOutError as error:
                if num_rows > 1 or num > 1:
                    num_failed = num
                else:
                    batch[0].fail(0, error)
                break
            except Exception:  # ONNX Runtime raises types of its own for what a model does
                num_failed = num
                break
            num_done += num
            self._turn_time_s[num_rows] = turn_time_s = (perf_counter() - start_s) / num
            turn_times_s += [turn_time_s] * num
            in_order = outputs if are_in_order else outputs[:, rows]
            self._take_outputs(batch, in_order.swapaxes(0, 1).copy())  # the next run uses the buffer again
            if num_done < num_turns and num_done % quantum == 0 and self._is_wanted():
                break
        if not num_done:  # nothing is left of those that are new
            are_old = np.repeat([r.steps_done > 0 for r in batch], [r.num_rows for r in batch])
            rows, write_slots = rows[are_old], write_slots[are_old]
        self._cache.add(self._runner.batch_rows(bank, num_rows)[rows], write_slots)
        for _ in range(num_failed):
            self._take_turn_alone([request for request in batch if not request.has_ended])

    def _run_limited(self, inputs: Steps, bank: int = 0, initial_rows: Rows | None = None) -> Steps:
        """As the runner's `run`.

        Raises:
            StepTimedOutError: it took too long.
        """
        self._limit.begin()
        try:
            return self._runner.run(inputs, bank, initial_rows)
        except Exception as error:  # ONNX Runtime raises types of its own
            if self._limit.was_reached:
                raise StepTimedOutError(self._runner.model.label, self._step_timeout_s) from error
            raise
        finally:
            if self._limit.end():
                self._runner.allow_runs()

    @staticmethod
    def _initial_rows(batch: list[EngineRequest], rows: Rows) -> Rows | None:
        """By batch row, where the state is from which a step that is reset begins; None: the model's own for all."""
        if all(request.initial_slots is None for request in batch):
            return None
        initial_rows = np.empty(len(rows), np.int64)
        initial_rows[rows] = _joined(
            [
                [INITIAL_SLOT] * request.num_rows if request.initial_slots is None else request.initial_slots
                for request in batch
            ]
        )
        return initial_rows

    def _take_outputs(self, batch: list[EngineRequest], outputs: Steps) -> None:
        """Give requests their next outputs, [R, K]; a session whose outputs are not finite has failed."""
        are_finite = self._runner.model.outputs.are_finite(outputs)
        first_row = 0
        for request in batch:
            rows = slice(first_row, first_row + request.num_rows)
            first_row = rows.stop
            if not are_finite:
                self._fail_not_finite(request, outputs[rows])
            request.take_outputs(outputs[rows])

    def _fail_not_finite(self, request: EngineRequest, outputs: Steps) -> None:
        """Fail the sessions whose next outputs, [S, K], are not finite, each at the first such step."""
        is_finite = self._runner.model.outputs.finite(outputs)
        for row in np.flatnonzero(~is_finite.all(axis=1)).tolist():
            step = int(request.first_steps[row]) + request.steps_done + int(is_finite[row].argmin())
            request.fail(row, OutputNotFiniteError(self._runner.model.label, step))

    def _fail_timed_out(self, request: EngineRequest, row: int, error: StepTimedOutError) -> None:
        """Fail a session whose step does not return; its later steps are not tried beside those of the others."""
        request.fail(row, error)
        request.inputs = request.inputs.copy()
        request.inputs[row] = self._runner.model.inputs.none(1, request.inputs.shape[1])[0]

    def _take_turn_alone(self, batch: list[EngineRequest]) -> None:
        """Run the next step of each session by itself: one session's inputs must not fail another's step."""
        self._cache.write_back()
        for request in batch:
            step, slots = request.steps_done, request.present_slots
            outputs = self._runner.model.outputs.none(request.num_rows, 1)
            for row in range(request.num_rows):
                if row in request.errors:
                    continue
                self._runner.move(np.array([slots[row]]), np.array([self._runner.first_batch_row(0)]))
                try:
                    inputs = np.ascontiguousarray(request.inputs[np.newaxis, row, step])
                    initial_row = None if request.initial_slots is None else [request.initial_slots[row]]
                    outputs[row] = self._run_limited(
                        inputs[np.newaxis],
                        initial_rows=None if initial_row is None else np.array(initial_row),
                    )[0]
                except StepTimedOutError as error:
                    self._fail_timed_out(request, row, error)
                    continue
                except Exception as error:  # as above
                    log.error(
                        "a step failed",
                        model=self._runner.model.label,
                        session_id=request.session_ids[row],
                        step=int(request.first_steps[row]) + step,
                        exc_info=error,
                    )
                    request.fail(row, StepFailedError(self._runner.model.label))
                    continue
                self._runner.move(
                    np.array([self._runner.first_batch_row(0)]), np.array([request.write_slots[row]])
                )
            self._fail_not_finite(request, outputs)
            request.take_outputs(outputs)

    def _place(self, slots: Rows) -> tuple[int, Rows, bool]:
        """Give the states of slots [R] a batch row each in one bank, so that no row between them is empty.

        The bank is the one where most of them are, or, if none is in any, the one unused for longest. There, a state
        in one of the first R rows keeps it (one of those that share it), and the others take what is free.

        Returns:
            the bank, the batch rows [R], and whether state i has row i.
        """
        pool_rows, in_order = self._cache.rows_of(slots), self._in_order[: len(slots)]
        bank = int(self._runner.banks_of(pool_rows[0]))
        if bank >= 0 and not np.count_nonzero(pool_rows != self._runner.batch_rows(bank, len(pool_rows))):
            self._note_use(bank)
            return bank, in_order, True
        banks = self._runner.banks_of(pool_rows)
        counts = np.bincount(banks + 1)[1:]
        bank = int(counts.argmax()) if len(counts) else self._banks_by_use[0]
        self._note_use(bank)
        first = self._runner.first_batch_row(bank)
        rows = pool_rows - first
        state_in = np.full(len(slots), _NOBODY)  # by batch row: which of the states is there
        staying = ((banks == bank) & (rows < len(slots))).nonzero()[0]
        state_in[rows[staying]] = staying
        is_free = state_in == _NOBODY
        if is_free.any():
            is_moving = np.ones(len(slots), bool)
            is_moving[state_in[~is_free]] = False
            rows[is_moving] = is_free.nonzero()[0]
            self._cache.load(pool_rows[is_moving], first + rows[is_moving])
        return bank, rows, False

    def _note_use(self, bank: int) -> None:
        if self._banks_by_use[-1] != bank:
            self._banks_by_use.remove(bank)
            self._banks_by_use.append(bank)

    def _forget_what_was_before(self, ended: list[EngineRequest]) -> None:
        """The states that requests began from are nobody's any more, unless they failed or somebody shares them."""
        slots = [
            request.slots
            if not request.errors and not request.shared_slots
            else [
                slot
                for row, slot in enumerate(request.slots)
                if row not in request.errors and slot not in request.shared_slots
            ]
            for request in ended
            if request.steps_done
        ]
        self._cache.forget(_joined(slots))

    def _read(self, requests: list[EngineRequest]) -> None:
        """Give requests that ended well the state they asked for."""
        for request, state in self._states_of(requests):
            request.state = state

    def _read_traces(self, requests: list[EngineRequest]) -> None:
        """Give requests the state they asked for, as it is after this step."""
        for request, state in self._states_of(requests):
            request.trace.append({name: state[name] for name in request.trace_names})

    def _states_of(self, requests: list[EngineRequest]) -> Iterator[tuple[EngineRequest, dict[str, Array]]]:
        """Requests with the present state of their sessions, by name, [S, ...state shape] each; read at once."""
        if not requests:
            return
        slots = _joined([request.present_slots for request in requests])
        self._cache.write_back(slots)
        states = self._runner.read(slots)
        first_row = 0
        for request in requests:
            rows = slice(first_row, first_row + request.num_rows)
            yield request, {name: values[rows] for name, values in states.items()}
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
