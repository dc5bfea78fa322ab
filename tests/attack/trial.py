"""Trial: one attack beside neighbours, on a real server in a process of its own, and what it did.

`__main__.py` runs the catalogue, and prints it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.model.spec import initial_value
from tests import step_models
from tests.attack import calls, files, frames, overload
from tests.attack.neighbours import Lot, keep_calling
from tests.conftest import ROOT

LEAST_GOODPUT = 0.8
_STEPS = 20_000
_RAMP_S = 2.0
"""Until an attack that has begun is at its height."""
_MOST_NEW_THREADS = 8
"""Which gRPC keeps for when it needs them again."""
TOKENS = {"neighbour": "n-token", "attacker": "a-token"}
_SPAWN = multiprocessing.get_context("spawn")

Attack = Callable[[str, Event], None]
ATTACKS: dict[str, Attack] = {
    "SETTINGS frames": frames.settings_flood,
    "PING frames": frames.ping_flood,
    "WINDOW_UPDATE frames": frames.window_flood,
    "PRIORITY frames": frames.priority_flood,
    "empty DATA frames": frames.empty_data_flood,
    "headers that never end": frames.continuation_flood,
    "calls reset at once": frames.rapid_reset,
    "200 uploads that stall": frames.stalled_uploads,
    "600 idle connections": frames.idle_connections,
    "bytes that are no message": calls.no_messages,
    "the same on streams": calls.no_messages_on_streams,
    "shapes of a million axes": calls.millions_of_axes,
    "batches of missing sessions": calls.missing_sessions,
    "requests of 4 MB": calls.large_requests,
    "imports of what is no snapshot": calls.forged_imports,
    "sessions made and ended": calls.sessions_made_and_ended,
    "lists of sessions": calls.lists,
    "streams that are not read": calls.unread_streams,
    "reflection": calls.reflection,
    "steps that do not return": calls.endless_steps,
    "model files that are none": files.bad_models,
}
WITH_TOKENS: dict[str, Attack] = {
    "tokens of nobody": calls.wrong_tokens,
    "steps of another principal, all it can": calls.steps_of_a_principal,
}


@dataclass(frozen=True)
class Row:
    """What one attack did."""

    name: str
    before: Lot
    during: Lot
    after: Lot
    mib_before: float
    mib_most: float
    mib_after: float
    log_bytes: int
    is_sound: bool
    """The server is healthy, and has no more threads than before."""

    @property
    def share(self) -> float:
        """Of their goodput that the neighbours kept."""
        return self.during.goodput / max(1e-9, self.before.goodput)

    @property
    def has_passed(self) -> bool:
        """Whether nobody was harmed."""
        num_wrong = self.before.num_wrong + self.during.num_wrong + self.after.num_wrong
        return self.share >= LEAST_GOODPUT and not num_wrong and self.is_sound and self.after.goodput > 0.9


class Server:
    """A server under attack: its process, its log in a file."""

    def __init__(self, directory: Path, *flags: str, only_slow: bool = False) -> None:
        self.models = directory / "models"
        self.models.mkdir(parents=True)
        if only_slow:
            step_models.write(self.models, overload.slow_model(), "slow")
        else:
            (self.models / "copy").symlink_to(ROOT / "models" / "copy")
            step_models.write(self.models, step_models.endless(), "endless")
        self.log = directory / "log"
        command = [sys.executable, "-m", "server", "--models", str(self.models), "--listen", "127.0.0.1:0"]
        command += ["--store", "none", "--device", "cpu", "--log-format", "json", "--step-timeout-s", "1"]
        command += ["--model-poll-s", "0.5", "--model-load-timeout-s", "10", *flags]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        self.address = self._wait_until_it_listens()
        self.watched = psutil.Process(self._process.pid)

    def _wait_until_it_listens(self) -> str:
        while self._process.poll() is None:
            for line in self.log.read_text().splitlines():
                if '"listening"' in line:
                    return str(json.loads(line)["address"])
            time.sleep(0.1)
        raise RuntimeError(f"the server ended: {self.log.read_text()}")

    @property
    def mib(self) -> float:
        """Memory of the process."""
        return float(self.watched.memory_info().rss) / 2**20

    @property
    def is_healthy(self) -> bool:
        """Whether it says so."""
        if self._process.poll() is not None:
            return False
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
            except grpc.RpcError:
                return False
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def neighbours_of(address: str, token: str) -> Iterator[Connection]:
    """Neighbours that call in a process of their own; asked by "lot"."""
    inputs = np.random.default_rng(0).integers(0, 2, (_STEPS, 9)).astype(np.float32)
    here, there = _SPAWN.Pipe()
    arguments = (address, token, _answers(inputs), inputs, there)
    process = _SPAWN.Process(target=keep_calling, args=arguments, daemon=True)
    process.start()
    try:
        yield here
    finally:
        here.send("end")
        process.join(10)
        process.kill()


def _answers(inputs: np.ndarray) -> np.ndarray:
    """What one session of the copy model answers, by ONNX Runtime alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ROOT / "models" / "copy" / "1" / "model.onnx", options)
    spec = step_models.read_back((ROOT / "models" / "copy" / "1" / "model.onnx").read_bytes())[1]
    state = {each.input_name: initial_value(each)[None] for each in spec.states}
    names = [spec.outputs[0].name, *(each.output_name for each in spec.states)]
    outputs = []
    for row in inputs:
        output, *states = session.run(names, {spec.inputs[0].name: row[None], **state})
        state = dict(zip(state, states, strict=True))
        outputs.append(output[0])
    return np.array(outputs)


def _attack_beside(name: str, address: str, begun: Event, stop: Event, models: str) -> None:
    os.nice(10)  # an attacker elsewhere takes none of this machine's time
    os.environ["ATTACKED_MODELS"] = models
    begun.set()
    (ATTACKS | WITH_TOKENS)[name](address, stop)


def try_out(name: str, server: Server, neighbours: Connection, seconds: float) -> Row:
    """Attack for some seconds."""

    def lot_after(span_s: float) -> Lot:
        time.sleep(span_s)
        neighbours.send("lot")
        lot: Lot = neighbours.recv()
        return lot

    lot_after(0.5)  # what was before does not count
    before, mib_before = lot_after(seconds / 2), server.mib
    num_threads, log_bytes = server.watched.num_threads(), server.log.stat().st_size
    begun, stop, most, is_over = _SPAWN.Event(), _SPAWN.Event(), [mib_before], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            most.append(server.mib)

    watching = threading.Thread(target=watch)
    watching.start()
    arguments = (name, server.address, begun, stop, str(server.models))
    process = _SPAWN.Process(target=_attack_beside, args=arguments)
    process.start()
    assert begun.wait(60)
    lot_after(_RAMP_S)
    during = lot_after(seconds)
    stop.set()
    process.join(30)
    process.kill()
    assert process.exitcode in (0, -9), f"the attack itself failed: {name}"
    lot_after(1.0)
    after = lot_after(seconds / 2)
    is_over.set()
    watching.join()
    is_sound = server.is_healthy and server.watched.num_threads() <= num_threads + _MOST_NEW_THREADS
    log_bytes = server.log.stat().st_size - log_bytes
    return Row(name, before, during, after, mib_before, max(most), server.mib, log_bytes, is_sound)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"| {row.name} | {row.share:.2f} | {row.before.p99_ms:.0f} | {row.during.p99_ms:.0f} | "
        f"{row.mib_before:.0f} | {row.mib_most:.0f} | {row.mib_after:.0f} | {row.log_bytes / 1024:.1f} | "
        f"{'' if row.has_passed else 'HARMED'} |"
    )


OVERLOADS = (1.5, 10.0)
"""Of the peak."""
OVERLOAD_HEAD = """| Asked for, by the peak | answered, by the peak | refused/s | p99 of the answered, ms | MiB | |
|---|---|---|---|---|---|"""


def try_overload(directory: Path, flags: list[str], seconds: float) -> Iterator[tuple[str, bool]]:
    """Lines of the table of overload, and whether each is as it is to be."""
    server = Server(directory, *overload.FLAGS, *flags, only_slow=True)
    try:
        payloads = overload.sessions_of(server.address)
        peak = overload.peak_of(server.address, payloads, seconds)
        half = overload.offer(server.address, payloads, peak / 2, seconds)

        def told(load: overload.Offered, is_good: bool) -> tuple[str, bool]:
            line = (
                f"| {load.asked_per_s / peak:.1f} ({load.sent_per_s:.0f}/s) | {load.good_per_s / peak:.2f} | "
                f"{load.refused_per_s:.0f} | {load.p99_ms:.0f} | {server.mib:.0f} | {'' if is_good else 'FAILED'} |"
            )
            return line, is_good

        yield told(half, half.good_per_s > 0.45 * peak)
        for times in OVERLOADS:
            load = overload.offer(server.address, payloads, times * peak, seconds)
            yield told(
                load,
                load.good_per_s >= overload.LEAST_GOODPUT * peak
                and load.p99_ms <= overload.MOST_P99 * half.p99_ms,
            )
        after = overload.offer(server.address, payloads, peak / 2, seconds)
        line, is_good = told(after, after.good_after_s <= overload.RECOVERS_WITHIN_S)
        yield f"{line} all is answered again after {after.good_after_s:.1f} s", is_good
    finally:
        server.stop()


HEAD = """| Attack | goodput kept | p99 before, ms | during, ms | MiB before | at most | after | log, KiB | |
|---|---|---|---|---|---|---|---|---|"""
