"""Sequence load: callers who come at random, step their sequence at an even pace, and go; open loop.

Each sequence is a script of messages: those that begin it, its steps, those that end it (`scripts.py` has them). A
message is due when its turn has come, whatever became of those before it, and its latency counts from then. Run a trial
by `load.in_own_process`; what a server bears is asked by `service_load.py`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from time import perf_counter, process_time
from typing import Literal

from benchmarks.http2 import Connection, LoadError, Stream, exchange
from benchmarks.load import quantile, wide_varint

INTERVAL_S = 0.02
"""From a message of a sequence to the next, as of a control loop at 50 Hz."""
DEADLINE_S = 0.1
SHARE_IN_TIME = 0.99
"""Of the messages that must be answered within the deadline."""

_RESOURCE_EXHAUSTED = 8
_ERROR_MESSAGE = b"\x0a"  # the tag of the field that a ModelStreamInferResponse begins with when it has it
# Callers are many; a server may read each connection in its own way.
_NUM_CONNECTIONS = 8


@dataclass(frozen=True)
class ScriptMessage:
    """One message of a sequence."""

    method: str
    is_streamed: bool
    """It goes with its neighbours over one stream, which each sequence has to itself; else it is a call."""
    pieces: tuple[bytes, ...]
    """Serialised, split where the id stands."""


@dataclass(frozen=True)
class Script:
    """The messages of a sequence, which is ended by the last of them."""

    messages: tuple[ScriptMessage, ...]
    """Sent one every `INTERVAL_S`."""
    num_steps: int
    """Messages that are steps: those that only begin or end it are not."""
    id_format: Literal["text", "varint"]
    tells_errors_in_band: bool = False
    """As Triton's streams do, whose status tells of none."""

    def id(self, number: int) -> bytes:
        """A sequence's id as its messages have it, as long as every other; `number` is under 2^34."""
        return f"{number:032x}".encode() if self.id_format == "text" else wide_varint(number)


@dataclass(frozen=True)
class TrialReport:
    """What became of one rate."""

    num_due: int
    """Messages due in the time that counts."""
    share_in_time: float
    p50_ms: float
    p99_ms: float
    num_sent: int
    """All messages, those before and after the time that counts as well."""
    num_sequences: int
    generator_cpu_share: float
    """CPU seconds of the generator's process by seconds of wall time."""

    @property
    def is_held(self) -> bool:
        """The messages were answered in time."""
        return self.share_in_time >= SHARE_IN_TIME


def trial(
    address: str, script: Script, *, steps_per_s: float, duration_s: float, first_number: int, seed: int
) -> TrialReport:
    """Offer a rate, and see how many messages are answered in time.

    Sequences begin for as long as one takes before messages count, so that as many live as the rate makes. When all
    messages that count are answered, the sequences that still live are ended at once. A rate that is lost already is
    given up.

    Args:
        address: HOST:PORT of the server.
        script: what each sequence sends.
        steps_per_s: the rate, all sequences together; what begins and ends them comes on top.
        duration_s: time in which messages that count are due.
        first_number: numbers from here on make ids that were never used on this server.
        seed: of the times at which sequences begin: a Poisson process, given how many there are.

    Raises:
        LoadError: a message failed otherwise than by being refused for too much load.
    """
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(Connection(address))) for _ in range(_NUM_CONNECTIONS)]
        callers = _Callers(connections, script, steps_per_s, duration_s)
        starts_s = random.Random(seed)  # noqa: S311  # nosec B311  # a load, no secret
        try:
            return callers.run(first_number, starts_s)
        except LoadError as error:
            if error.status != _RESOURCE_EXHAUSTED:
                raise
            return callers.report(is_refused=True)


class _Caller:
    """One sequence."""

    __slots__ = ("connection", "due_s", "id", "num_due", "num_sent", "start_s", "stream")

    def __init__(self, connection: Connection, sequence_id: bytes, start_s: float) -> None:
        self.connection = connection
        self.id = sequence_id
        self.start_s = start_s
        self.num_due = self.num_sent = 0
        self.due_s: deque[float] = deque()
        """When each message was due that is not answered."""
        self.stream: Stream | None = None

    def next_due_s(self) -> float:
        return self.start_s + self.num_due * INTERVAL_S


class _Callers:
    """All sequences of a trial."""

    def __init__(
        self, connections: Sequence[Connection], script: Script, steps_per_s: float, duration_s: float
    ) -> None:
        self._connections = connections
        self._script, self._messages = script, script.messages
        self._lead_s, self._duration_s = len(self._messages) * INTERVAL_S, duration_s
        self.num_sequences = round(steps_per_s / script.num_steps * (self._lead_s + duration_s))
        num_expected = steps_per_s / script.num_steps * len(self._messages) * duration_s
        self._most_late = 2 * (1 - SHARE_IN_TIME) * num_expected
        self._live: set[_Caller] = set()
        self._from_s = self._to_s = 0.0
        self._is_ending = False
        self._latencies_s: list[float] = []
        self._num_due = self._num_late = self._num_sent = 0
        self._start_s, self._start_cpu_s = perf_counter(), process_time()

    def run(self, first_number: int, randomness: random.Random) -> TrialReport:
        start_s = perf_counter()
        self._from_s = start_s + self._lead_s
        self._to_s = self._from_s + self._duration_s
        waiting = []
        for number in range(self.num_sequences):
            connection = self._connections[number % len(self._connections)]
            begin_s = randomness.uniform(start_s, self._to_s)
            caller = _Caller(connection, self._script.id(first_number + number), begin_s)
            waiting.append((begin_s, number, caller))
        heapify(waiting)
        while (now_s := perf_counter()) < self._to_s and self._num_late <= self._most_late:
            while waiting and waiting[0][0] <= now_s:
                due_s, number, caller = heappop(waiting)
                self._live.add(caller)
                self._num_due += self._from_s <= due_s
                caller.num_due += 1
                if caller.num_due < len(self._messages):
                    heappush(waiting, (caller.next_due_s(), number, caller))
                self._send_due(caller)
            next_s = min(self._to_s, waiting[0][0]) if waiting else self._to_s
            self._turn(max(0.0, next_s - now_s))
        while len(self._latencies_s) < self._num_due and self._num_late <= self._most_late:
            self._turn(None)
        report = self.report()
        self._end()
        return replace(report, num_sent=self._num_sent)

    def report(self, is_refused: bool = False) -> TrialReport:
        """What has counted so far."""
        latencies_s = sorted(self._latencies_s) or [math.inf]
        share = (len(self._latencies_s) - self._num_late) / max(1, self._num_due)
        return TrialReport(
            num_due=self._num_due,
            share_in_time=0.0 if is_refused else share,
            p50_ms=1e3 * quantile(latencies_s, 0.5),
            p99_ms=1e3 * quantile(latencies_s, 0.99),
            num_sent=self._num_sent,
            num_sequences=self.num_sequences,
            generator_cpu_share=(process_time() - self._start_cpu_s) / (perf_counter() - self._start_s),
        )

    def _turn(self, timeout_s: float | None) -> None:
        now_s, events = exchange(self._connections, timeout_s)
        for stream, answer in events:
            if answer is not None:
                self._take(stream.owner, answer, now_s)

    def _take(self, caller: _Caller, answer: bytes, now_s: float) -> None:
        if self._script.tells_errors_in_band and answer.startswith(_ERROR_MESSAGE):
            raise LoadError(f"a stream's answer is an error: {answer[2:]!r}")
        due_s = caller.due_s.popleft()
        if self._from_s <= due_s < self._to_s:
            self._latencies_s.append(now_s - due_s)
            self._num_late += now_s - due_s > DEADLINE_S
        if self._is_ending and not caller.due_s:
            self._end_caller(caller)
        elif not self._is_ending:
            self._send_due(caller)
            if caller.num_sent == len(self._messages) and not caller.due_s:
                self._live.discard(caller)

    def _send_due(self, caller: _Caller) -> None:
        """Send what is due, and need not wait for the answer before it."""
        while caller.num_sent < caller.num_due:
            at = caller.num_sent
            is_in_order = self._messages[at].is_streamed and self._messages[at - 1].is_streamed
            if caller.due_s and not is_in_order:
                return
            self._send(caller)

    def _send(self, caller: _Caller) -> None:
        at = caller.num_sent
        message = self._messages[at]
        stream = caller.stream or caller.connection.open(message.method, caller)
        ends = (
            not message.is_streamed or at + 1 == len(self._messages) or not self._messages[at + 1].is_streamed
        )
        caller.connection.send(stream, caller.id.join(message.pieces), ends=ends)
        caller.stream = None if ends else stream
        caller.due_s.append(caller.start_s + at * INTERVAL_S)
        caller.num_sent += 1
        self._num_sent += 1

    def _end(self) -> None:
        """End the sequences that live, each when it has its answers."""
        self._is_ending = True
        for caller in list(self._live):
            if not caller.due_s:
                self._end_caller(caller)
        while self._live:
            self._turn(None)

    def _end_caller(self, caller: _Caller) -> None:
        last = len(self._messages) - 1
        if not 0 < caller.num_sent <= last:  # nothing was begun, or all is done
            self._live.discard(caller)
            return
        if caller.stream is not None and not self._messages[last].is_streamed:
            caller.connection.end(caller.stream)
            caller.stream = None
        caller.num_sent = last
        self._send(caller)
