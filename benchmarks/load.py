"""Load: messages sent to a gRPC server, as fast as it answers or at a given rate, and what came of it.

A load has lanes: independent sequences of messages, such as one session's. The generator speaks HTTP/2 itself
(`http2.py`) and does little else, since it must not be the limit of what it measures; a report tells its share
of a core. Run it by `in_own_process`, so that it shares no interpreter with the server or with other work.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter, process_time
from typing import Literal, ParamSpec, TypeVar

from benchmarks.http2 import Connection, LoadError, exchange

__all__ = [
    "Call",
    "Kind",
    "LoadError",
    "LoadReport",
    "closed_loop",
    "in_own_process",
    "open_loop",
    "quantile",
    "wide_varint",
]

P = ParamSpec("P")
R = TypeVar("R")
Kind = Literal["unary", "stream"]


@dataclass(frozen=True)
class Call:
    """A lane's messages, all alike but for the index of their first step; `calls.py` builds them.

    A message is `before`, the index once for each session as a varint of 5 bytes, and `after`. In the lane's
    message number n, counted from 0, the index is `first_step` + n T.
    """

    method: str
    """Such as "/ntm.v1.SessionService/Step"."""
    before: bytes
    after: bytes = b""
    num_sessions: int = 1
    """S: sessions in one message."""
    steps_per_message: int = 1
    """T: steps of each of them in one message."""
    first_step: int = 0
    is_numbered: bool = True
    """False: there is no index, and every message is `before` and `after`."""

    @property
    def num_steps(self) -> int:
        """Session-steps in one message: S T."""
        return self.num_sessions * self.steps_per_message

    def payload(self, number: int) -> bytes:
        """The serialised message with this number."""
        if not self.is_numbered:
            return self.before + self.after
        index = wide_varint(self.first_step + number * self.steps_per_message)
        return self.before + index * self.num_sessions + self.after


@dataclass(frozen=True)
class LoadReport:
    """What became of a load; what was not counted is in `num_steps_sent` alone."""

    num_messages: int
    """Answered messages."""
    num_steps: int
    """Session-steps in them: S T each."""
    num_steps_sent: int
    """Session-steps in all messages, those answered too early or too late as well: what the server worked for."""
    wall_s: float
    """Time in which they were answered."""
    p50_ms: float
    p99_ms: float
    generator_cpu_share: float
    """CPU seconds of the generator's process by seconds of wall time; over 0.9 the generator is the limit."""
    last_answers: tuple[bytes, ...]
    """The last answer to each lane, serialised: what a status does not tell, such as a BatchStep's `errors`."""
    offered_per_s: float | None = None
    """Messages that were due by second of an open loop."""

    @property
    def messages_per_s(self) -> float:
        return self.num_messages / self.wall_s

    @property
    def steps_per_s(self) -> float:
        return self.num_steps / self.wall_s

    @property
    def is_limited_by_generator(self) -> bool:
        return self.generator_cpu_share > 0.9

    @property
    def is_offered_load_kept(self) -> bool:
        """False: the messages of an open loop were due faster than they were answered, by a twentieth or more."""
        return self.offered_per_s is None or self.messages_per_s >= 0.95 * self.offered_per_s


def closed_loop(
    address: str,
    lanes: Sequence[Call],
    kind: Kind,
    *,
    in_flight: int = 1,
    num_messages: int | None = None,
    duration_s: float | None = None,
    warmup_messages: int = 0,
    num_connections: int = 1,
) -> LoadReport:
    """Keep up to `in_flight` messages of each lane unanswered, for `num_messages` of each or for `duration_s`.

    Args:
        address: HOST:PORT of the server.
        lanes: one entry for each lane. They share the connections evenly.
        kind: "unary": every message is a call. "stream": every lane is a call with a stream of messages.
        in_flight: messages of a lane that may wait for their answers. gRPC keeps the order of a stream's messages, but
            not that of calls.
        num_messages: messages of each lane, all of which are counted.
        duration_s: time for which answers are counted, from when every lane has had one: opening many streams and
            filling their lines takes long, and is not what they do then.
        warmup_messages: messages of each lane before any are counted, all of which are answered first.
        num_connections: connections to the server.

    Raises:
        LoadError: a call failed, or the connection did.
    """
    assert (num_messages is None) != (duration_s is None)
    with _connected(address, lanes, kind, num_connections) as generator:
        generator.warm_up(in_flight, warmup_messages)
        if duration_s is None:
            meter = _Meter()
            for answer in generator.saturate(in_flight, num_messages):
                meter.add(answer)
        else:
            meter = _counted(generator, in_flight, duration_s)
        return meter.report(generator, wall_s=meter.last_answer_s - meter.start_s)


def open_loop(
    address: str,
    lanes: Sequence[Call],
    kind: Kind,
    *,
    messages_per_s: float,
    duration_s: float,
    poisson_seed: int | None = None,
    warmup_messages: int = 0,
    num_connections: int = 1,
) -> LoadReport:
    """Send at a given rate, whatever the server does; each message goes to the lane that is free the longest.

    A message that finds no lane free waits for one, and its latency counts from when it was due. One that still
    waits at the end is not sent, and enters the latencies with the time it has waited.

    Args:
        address: as in `closed_loop`, and so are the others not named here.
        lanes: see `address`. A lane is free when it has no message unanswered.
        kind: see `address`.
        messages_per_s: rate at which messages are due.
        duration_s: time in which they are due; much longer than an answer takes.
        poisson_seed: makes them due at random times, as independent callers do. None: evenly spread.
        warmup_messages: see `address`.
        num_connections: see `address`.
    """
    with _connected(address, lanes, kind, num_connections) as generator:
        generator.warm_up(1, warmup_messages)
        meter = _Meter()
        end_s = meter.start_s + duration_s
        due_times = _due_times(meter.start_s, messages_per_s, poisson_seed)
        due_s, num_due = next(due_times), 0
        free, waiting = deque(generator.lanes), deque[float]()
        while (now_s := perf_counter()) < end_s or len(free) < len(generator.lanes):
            while due_s <= now_s and due_s < end_s:
                waiting.append(due_s)
                due_s, num_due = next(due_times), num_due + 1
            while waiting and free and now_s < end_s:
                free.popleft().send(waiting.popleft())
            timeout_s = max(0.0, min(due_s, end_s) - now_s) if now_s < end_s else None
            for answer in generator.turn(timeout_s):
                meter.add(answer)
                free.append(answer.lane)
        meter.latencies_s += [perf_counter() - due_s for due_s in waiting]
        wall_s = max(meter.last_answer_s - meter.start_s, duration_s)
        return meter.report(generator, wall_s, offered_per_s=num_due / duration_s)


def in_own_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `closed_loop` or `open_loop`, or what calls them at a module's top level, in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def wide_varint(value: int) -> bytes:
    """A varint of 5 bytes, whatever the value below 2^35, so that nothing around it changes its length."""
    return bytes(
        (
            value & 127 | 128,
            value >> 7 & 127 | 128,
            value >> 14 & 127 | 128,
            value >> 21 & 127 | 128,
            value >> 28,
        )
    )


class _UnaryLane:
    """A lane in which every message is a call."""

    is_ended = True

    def __init__(self, call: Call, connection: Connection) -> None:
        self.call = call
        self.num_sent = 0
        self.last_answer = b""
        self._connection = connection
        self._due_s: dict[int, float] = {}
        self._answers: dict[int, bytes] = {}

    def send(self, due_s: float) -> None:
        stream = self._connection.open(self.call.method, self)
        self._connection.send(stream, self.call.payload(self.num_sent), ends=True)
        self._due_s[stream.id] = due_s
        self.num_sent += 1

    def take(self, stream_id: int, message: bytes | None) -> float | None:
        """Take in what came; returns when the message was due that is answered by it."""
        if message is not None:
            if stream_id in self._answers:
                raise LoadError("a unary call was answered twice")
            self._answers[stream_id] = message
            return None
        if stream_id not in self._answers:
            raise LoadError("a unary call ended without an answer")
        self.last_answer = self._answers.pop(stream_id)
        return self._due_s.pop(stream_id)

    def end(self) -> None:
        """Every call has ended with its answer."""


class _StreamLane:
    """A lane that is one call with a stream of messages."""

    def __init__(self, call: Call, connection: Connection) -> None:
        self.call = call
        self.num_sent = 0
        self.last_answer = b""
        self._connection = connection
        self._due_s: deque[float] = deque()
        self._stream = connection.open(call.method, self)
        self._is_ending = self.is_ended = False

    def send(self, due_s: float) -> None:
        self._connection.send(self._stream, self.call.payload(self.num_sent), ends=False)
        self._due_s.append(due_s)
        self.num_sent += 1

    def take(self, stream_id: int, message: bytes | None) -> float | None:
        """As `_UnaryLane.take`."""
        if message is None:
            if not self._is_ending:
                raise LoadError("a stream ended early, with status OK")
            self.is_ended = True
            return None
        if not self._due_s:
            raise LoadError("a stream had more answers than messages")
        self.last_answer = message
        return self._due_s.popleft()

    def end(self) -> None:
        self._connection.end(self._stream)
        self._is_ending = True


_Lane = _UnaryLane | _StreamLane


@dataclass(slots=True)
class _Answer:
    lane: _Lane
    due_s: float
    time_s: float


class _Generator:
    """Lanes over connections."""

    def __init__(self, connections: Sequence[Connection], lanes: Sequence[Call], kind: Kind) -> None:
        make = _UnaryLane if kind == "unary" else _StreamLane
        self._connections = connections
        self.lanes: list[_Lane] = [
            make(call, connections[i % len(connections)]) for i, call in enumerate(lanes)
        ]
        self.is_ending = False
        """Nothing more is sent; what is unanswered is waited for."""

    def turn(self, timeout_s: float | None = None) -> list[_Answer]:
        """Send what is ready in one piece, wait (None: for an answer that must come), and take in what came."""
        now_s, events = exchange(self._connections, timeout_s)
        answers = []
        for stream, message in events:
            due_s = stream.owner.take(stream.id, message)
            if due_s is not None:
                answers.append(_Answer(stream.owner, due_s, now_s))
        return answers

    def saturate(self, in_flight: int, num_messages: int | None = None) -> Iterator[_Answer]:
        """Send so many messages on every lane, or until `is_ending`, with up to `in_flight` of them unanswered."""
        now_s, num_unanswered = perf_counter(), 0
        most = math.inf if num_messages is None else num_messages
        last = {lane: lane.num_sent + most for lane in self.lanes}
        for lane in self.lanes:
            for _ in range(int(min(in_flight, most))):
                lane.send(now_s)
                num_unanswered += 1
        while num_unanswered:
            for answer in self.turn():
                yield answer
                if answer.lane.num_sent < last[answer.lane] and not self.is_ending:
                    answer.lane.send(answer.time_s)
                else:
                    num_unanswered -= 1

    def warm_up(self, in_flight: int, num_messages: int) -> None:
        for _ in self.saturate(in_flight, num_messages):
            pass

    def end(self) -> None:
        """End the calls in good order."""
        for lane in self.lanes:
            lane.end()
        while not all(lane.is_ended for lane in self.lanes):
            self.turn()


@contextmanager
def _connected(address: str, lanes: Sequence[Call], kind: Kind, num_connections: int) -> Iterator[_Generator]:
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(Connection(address))) for _ in range(num_connections)]
        generator = _Generator(connections, lanes, kind)
        yield generator
        generator.end()


def _counted(generator: _Generator, in_flight: int, duration_s: float) -> _Meter:
    """What is answered in so long a time, from when every lane has had an answer."""
    unheard, meter = {*generator.lanes}, None
    for answer in generator.saturate(in_flight):
        if meter is None:
            unheard.discard(answer.lane)
            if not unheard:
                meter = _Meter(answer.time_s)
        elif answer.time_s > meter.start_s + duration_s:
            generator.is_ending = True
        elif answer.time_s > meter.start_s:
            meter.add(answer)
    assert meter is not None
    return meter


class _Meter:
    """Counts from a time, or from when it is made."""

    def __init__(self, start_s: float | None = None) -> None:
        self.latencies_s: list[float] = []
        self.start_s = self.last_answer_s = perf_counter() if start_s is None else start_s
        self._cpu_start_s = process_time()
        self._num_messages = self._num_steps = 0

    def add(self, answer: _Answer) -> None:
        self.latencies_s.append(answer.time_s - answer.due_s)
        self.last_answer_s = answer.time_s
        self._num_messages += 1
        self._num_steps += answer.lane.call.num_steps

    def report(self, generator: _Generator, wall_s: float, offered_per_s: float | None = None) -> LoadReport:
        if not self._num_messages:
            raise LoadError("no message was answered in the time given")
        cpu_share = (process_time() - self._cpu_start_s) / (perf_counter() - self.start_s)
        latencies_s = sorted(self.latencies_s)
        return LoadReport(
            num_messages=self._num_messages,
            num_steps=self._num_steps,
            num_steps_sent=sum(lane.num_sent * lane.call.num_steps for lane in generator.lanes),
            wall_s=wall_s,
            p50_ms=1e3 * quantile(latencies_s, 0.5),
            p99_ms=1e3 * quantile(latencies_s, 0.99),
            generator_cpu_share=cpu_share,
            last_answers=tuple(lane.last_answer for lane in generator.lanes),
            offered_per_s=offered_per_s,
        )


def quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return ascending[math.ceil(share * len(ascending)) - 1]


def _due_times(start_s: float, per_s: float, poisson_seed: int | None) -> Iterator[float]:
    if poisson_seed is None:
        yield from (start_s + number / per_s for number in count())
    randomness = random.Random(poisson_seed)  # noqa: S311  # nosec B311  # no secret: made again by its seed
    due_s = start_s
    while True:
        yield (due_s := due_s + randomness.expovariate(per_s))
