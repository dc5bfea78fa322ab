"""Serving: what the server reaches through gRPC, beside the bare step, an empty service and the peers.

All servers run at once, each in processes of its own, and take turns within a round; the load is generated in yet
another process. A case is named by what it does, such as "StreamSteps, 64 sessions, T=32".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from benchmarks import echo
from benchmarks.bare import BareLoop
from benchmarks.engine import EngineAlone
from benchmarks.load import Call, Kind, LoadReport, closed_loop, in_own_process, open_loop
from benchmarks.measuring import Case, Figures, Metrics, side_by_side
from benchmarks.peers import naive, triton
from benchmarks.server_process import MODELS, Sessions, Shape, serving
from tests.valkey import ValkeyServer

MODEL = MODELS / "copy" / "1" / "model.onnx"
NUM_SESSIONS = (1, 8, 64, 512)
MAX_BATCH_SIZE = 64
# A server process is up to 8 % faster or slower than the next, all its life: in `compare` loads go to several in turn.
_NUM_PROCESSES = 3

# What Triton can do as well: one step a message.
STREAMS_OF_SINGLE_STEPS = Shape("StreamSteps", 32, 1, in_flight=4)
STREAMS_OF_CHUNKS = Shape("StreamSteps", 64, 32, in_flight=4)
# What everybody does first: one step a call, from many callers.
PLAIN_CALLS = Shape("Step", 64, 1)
# Four callers, each with 64 sessions of its own.
BATCHES_OF_SINGLE_STEPS = Shape("BatchStep", 256, 1, num_lanes=4)
# The naive service runs one step after another, for however many streams; with few, it answers within a round.
FEW_STREAMS_OF_CHUNKS = Shape("StreamSteps", 4, 32)
OFFERED_PER_S = (250, 500, 1000, 2000)

Servers = Callable[[], AbstractContextManager[tuple[str, list[int]]]]
"""Starts a server; gives its address and the ids of its processes."""


def compare(num_rounds: int, duration_s: float) -> Figures:
    """Measure everything; raises TritonUnavailableError without Triton."""
    with _cases(duration_s, _NUM_PROCESSES) as cases:
        for num_sessions in NUM_SESSIONS:
            if num_sessions <= MAX_BATCH_SIZE:
                cases.add_bare(num_sessions)
                cases.add_engine(num_sessions, 1)
                cases.add_engine(num_sessions, 32)
            for num_steps in (1, 32):
                cases.add_ours(Shape("BatchStep", num_sessions, num_steps))
            for num_steps in (1, 8, 32):
                cases.add_ours(Shape("StreamSteps", num_sessions, num_steps, in_flight=4))
            cases.add_ours(Shape("Step", num_sessions, 1))
        cases.add_ours(BATCHES_OF_SINGLE_STEPS)
        cases.add_ours(STREAMS_OF_SINGLE_STEPS)
        for flavour in echo.FLAVOURS:
            cases.add_echo(flavour, STREAMS_OF_SINGLE_STEPS)
            cases.add_echo(flavour, Shape("Step", 64, 1))
        cases.add_echo("uvloop", STREAMS_OF_CHUNKS)
        cases.add_echo("uvloop", Shape("BatchStep", 64, 1))
        cases.add_naive(STREAMS_OF_SINGLE_STEPS)
        cases.add_naive(FEW_STREAMS_OF_CHUNKS)
        cases.add_triton("stream", 32, in_flight=4)
        cases.add_triton("stream", 64, in_flight=4)
        for num_callers in NUM_SESSIONS[:3]:
            cases.add_triton("unary", num_callers)
        return side_by_side(cases.by_name, num_rounds)


def compare_main(num_rounds: int, duration_s: float) -> Figures:
    """Measure what `make bench-quick` holds against its floors, all but the peer that has to be installed."""
    with _cases(duration_s) as cases:
        cases.add_bare(64)
        cases.add_engine(64, 32)
        for shape in (
            Shape("BatchStep", 64, 32),
            BATCHES_OF_SINGLE_STEPS,
            STREAMS_OF_CHUNKS,
            STREAMS_OF_SINGLE_STEPS,
            PLAIN_CALLS,
        ):
            cases.add_ours(shape)
        cases.add_echo("uvloop", STREAMS_OF_SINGLE_STEPS)
        cases.add_echo("uvloop", PLAIN_CALLS)
        cases.add_naive(FEW_STREAMS_OF_CHUNKS)
        return side_by_side(cases.by_name, num_rounds)


def compare_latency(num_rounds: int, duration_s: float) -> Figures:
    """Measure latency at equal offered load, this server's and Triton's: single steps at random times, 32 streams."""
    with _cases(duration_s) as cases:
        for per_s in OFFERED_PER_S:
            cases.add_ours(STREAMS_OF_SINGLE_STEPS, per_s)
            cases.add_triton("stream", 32, messages_per_s=per_s)
        return side_by_side(cases.by_name, num_rounds)


STORES = ("none", "SQLite, sync full", "SQLite, sync normal", "Valkey, everysec")
SHAPES_BY_STORE = (Shape("BatchStep", 64, 32), STREAMS_OF_CHUNKS, STREAMS_OF_SINGLE_STEPS)


def compare_stores(num_rounds: int, duration_s: float) -> Figures:
    """Measure what it costs to keep sessions: the same loads on a server for each store."""
    with _cases(duration_s) as cases:
        for shape in SHAPES_BY_STORE:
            for store in STORES:
                cases.add_store(store, shape)
        return side_by_side(cases.by_name, num_rounds)


def name(shape: Shape, server: str = "", messages_per_s: float | None = None) -> str:
    """The name of a case."""
    offered = f", {messages_per_s:g} messages/s offered" if messages_per_s else ""
    who = f"{server}: " if server else ""
    callers = f"{shape.num_lanes} x " if shape.num_lanes > 1 else ""
    num_sessions = shape.num_sessions // shape.num_lanes
    return f"{who}{shape.rpc}, {callers}{num_sessions} sessions, T={shape.num_steps}{offered}"


@contextmanager
def _cases(duration_s: float, num_processes: int = 1) -> Iterator[_Cases]:
    with ExitStack() as stack:
        yield _Cases(stack, duration_s, num_processes)


class _Cases:
    """Cases by name, and the servers they need, each started when the first case needs it."""

    def __init__(self, stack: ExitStack, duration_s: float, num_processes: int) -> None:
        """Run so many processes of this server and of the empty service, which are held against each other."""
        self.by_name: dict[str, Case] = {}
        self._stack = stack
        self._duration_s = duration_s
        self._num_processes = num_processes
        self._running: dict[str, tuple[str, list[int]]] = {}

    def add_bare(self, batch_size: int) -> None:
        loop = BareLoop(MODEL.read_bytes(), batch_size)
        self.by_name[f"bare, batch {batch_size}"] = partial(loop.measure, self._duration_s)

    def add_engine(self, num_sessions: int, num_steps: int) -> None:
        for together, how in ((True, "in one message"), (False, "in a message each")):
            engine = EngineAlone(MODEL, num_sessions, num_steps, together)
            case = f"engine, {num_sessions} sessions {how}, T={num_steps}"
            self.by_name[case] = partial(engine.measure, self._duration_s)

    def add_ours(self, shape: Shape, messages_per_s: float | None = None) -> None:
        start = partial(serving, MODELS, "--max-resident-sessions", "8192")
        self._add_shape(shape, "", start, messages_per_s, self._num_processes)

    def add_store(self, store: str, shape: Shape) -> None:
        self._add_shape(shape, store, partial(on_store, store))

    def add_naive(self, shape: Shape) -> None:
        self._add_shape(shape, "naive", naive.serving)

    def add_echo(self, flavour: str, shape: Shape) -> None:
        start = partial(echo.running, flavour)
        self._add_shape(shape, f"echo with {flavour}", start, num_processes=self._num_processes)

    def add_triton(
        self, kind: Kind, num_sequences: int, in_flight: int = 1, messages_per_s: float | None = None
    ) -> None:
        address, pids = self._server("Triton", _triton_with_sequences)
        shape = Shape("StreamSteps" if kind == "stream" else "Step", num_sequences, 1, in_flight)
        lanes = _triton_lanes(kind, range(1, num_sequences + 1))
        load = LoadCase(address, pids, shape, lambda: lanes, self._duration_s, messages_per_s)
        self.by_name[name(shape, "Triton", messages_per_s)] = load.measure

    def _add_shape(
        self,
        shape: Shape,
        server: str,
        start: Servers,
        messages_per_s: float | None = None,
        num_processes: int = 1,
    ) -> None:
        loads = []
        for number in range(num_processes):
            address, pids = self._server(f"{server} {number}", start)
            load = LoadCase.on_sessions(address, pids, shape, self._duration_s, messages_per_s)
            loads.append(load)
        self.by_name[name(shape, server, messages_per_s)] = _in_turn(loads)

    def _server(self, server: str, start: Servers) -> tuple[str, list[int]]:
        if server not in self._running:
            self._running[server] = self._stack.enter_context(start())
        return self._running[server]


def _in_turn(loads: Sequence[LoadCase]) -> Case:
    """Loads of which each call measures one; the first runs all, so that none is cold when its turn comes."""

    def turns() -> Iterator[Metrics]:
        for load in loads[1:]:
            load.measure()
        for load in cycle(loads):
            yield load.measure()

    return partial(next, turns())


class LoadCase:
    """A load on a server, and what it costs there."""

    @classmethod
    def on_sessions(
        cls,
        address: str,
        pids: list[int],
        shape: Shape,
        duration_s: float,
        messages_per_s: float | None = None,
    ) -> LoadCase:
        """A load on new sessions of a server that has the project's API."""
        sessions = Sessions(address, shape)
        return cls(address, pids, shape, sessions.lanes, duration_s, messages_per_s, sessions.advance)

    def __init__(
        self,
        address: str,
        pids: list[int],
        shape: Shape,
        lanes: Callable[[], list[Call]],
        duration_s: float,
        messages_per_s: float | None = None,
        on_report: Callable[[LoadReport], None] = lambda _: None,
    ) -> None:
        self._address, self._processes = address, [psutil.Process(pid) for pid in pids]
        self._shape, self._lanes, self._on_report = shape, lanes, on_report
        self._duration_s, self._messages_per_s = duration_s, messages_per_s

    def measure(self) -> Metrics:
        """Run the load once."""
        start_cpu_s = self._cpu_s()
        if self._messages_per_s is None:
            report = in_own_process(
                closed_loop,
                self._address,
                self._lanes(),
                self._shape.kind,
                in_flight=self._shape.in_flight,
                duration_s=self._duration_s,
            )
        else:
            report = in_own_process(
                open_loop,
                self._address,
                self._lanes(),
                self._shape.kind,
                messages_per_s=self._messages_per_s,
                duration_s=self._duration_s,
                poisson_seed=0,
                warmup_messages=1,  # which opens the streams
            )
        self._on_report(report)
        return {
            "steps_per_s": report.steps_per_s,
            "messages_per_s": report.messages_per_s,
            "p50_ms": report.p50_ms,
            "p99_ms": report.p99_ms,
            "cpu_us_per_step": (self._cpu_s() - start_cpu_s) / report.num_steps_sent * 1e6,
            "generator_cpu_share": report.generator_cpu_share,
        }

    def _cpu_s(self) -> float:
        """Processor time of the server's processes."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


@contextmanager
def on_store(store: str, *flags: str) -> Iterator[tuple[str, list[int]]]:
    """The server with its sessions in one of `STORES`, whose own processes count as its."""
    with TemporaryDirectory(prefix="ntm-store-") as directory, ExitStack() as stack:
        urls, pids = {"none": "none"}, []
        if store.startswith("Valkey"):
            valkey = ValkeyServer(Path(directory) / "valkey", appendfsync="everysec")
            valkey.start()
            stack.callback(valkey.kill)
            urls[store], pids = valkey.url, [valkey.pid]
        url = urls.get(store, f"sqlite:///{directory}/sessions.sqlite3")
        sync = "full" if store.endswith("full") or store == "none" else "normal"
        address, own = stack.enter_context(serving(MODELS, "--sync", sync, *flags, store=url))
        yield address, [*own, *pids]


@contextmanager
def _triton_with_sequences() -> Iterator[tuple[str, list[int]]]:
    """Triton with 64 sequences begun."""
    with triton.serving(num_sequences=64) as (address, pids):
        lanes = _triton_lanes("stream", range(1, 65), start=True)
        in_own_process(closed_loop, address, lanes, "stream", num_messages=1)
        yield address, pids


def _triton_lanes(kind: Kind, sequence_ids: range, start: bool = False) -> list[Call]:
    bits = np.random.default_rng(0).integers(0, 2, (len(sequence_ids), naive.INPUT_SIZE)).astype(np.float32)
    method = triton.STREAM_METHOD if kind == "stream" else triton.UNARY_METHOD
    return [
        Call(method, triton.step_message(sequence_id, inputs, start=start), is_numbered=False)
        for sequence_id, inputs in zip(sequence_ids, bits, strict=True)
    ]
