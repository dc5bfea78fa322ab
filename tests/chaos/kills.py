"""Kill -9: a server is killed again and again under load, and what its sessions have become is counted in the end.

Clients, in threads and in tasks, drive sessions with Step, BatchStep and streams, fork and reset them, and repeat what
was unavailable, as the project's client does by itself. Few sessions fit in the server's memory and snapshots are
frequent, so that kills hit messages, commits, paging, recoveries and starts. In the end each session is held against
an unbroken run of the same inputs: the accumulator computed here, the shipped model run by a server that nobody kills.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ntm import AsyncClient, Client
from tests import step_models
from tests.conftest import ROOT, ServerProcess
from tests.valkey import free_port

PATIENCE_S = 60.0
_RETRY_FOR_S = 600.0
"""A client can be unlucky for long when the server is killed as soon as it has answered any other."""
RESET = "reset"

_SESSIONS_EACH = 6
_STEPS_OF_A_SESSION = 400
_MOST_STEPS = 6
_LONG_STEPS = 150
"""Of one message in twenty, so that kills come in the middle of messages, too."""
_WIDTHS = {"accumulator": step_models.WIDTH, "copy": 9}


@dataclass
class Tally:
    """What so many kills did."""

    store: str
    kills: int = 0
    sessions: int = 0
    steps_answered: int = 0
    steps_lost: int = 0
    steps_doubled: int = 0
    bits_differing: int = 0
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.steps_lost or self.steps_doubled or self.bits_differing)


def table(tallies: list[Tally]) -> str:
    """The tallies as a table in Markdown."""
    names = [name.name.replace("_", " ") for name in fields(Tally)]
    rows = [
        [str(round(getattr(t, f.name)) if f.type == "float" else getattr(t, f.name)) for f in fields(t)]
        for t in tallies
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *rows])


@dataclass(eq=False)
class Track:
    """One session: what was asked of it, and what it answered."""

    session: Any
    """Of the synchronous or the asynchronous client."""
    model: str
    asked: list[Any] = field(default_factory=list)
    """Inputs [T, ...], or RESET."""
    outputs: list[np.ndarray] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.outputs))

    def forked(self, session: Any) -> Track:
        return Track(session, self.model, [*self.asked], [*self.outputs])


class KilledServer:
    """A server on one port and one store, whatever becomes of its process."""

    def __init__(self, models: Path, store: str, log: Path, *flags: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._log = log
        self._command = [sys.executable, "-m", "server", "--models", str(models), "--device", "cpu"]
        self._command += ["--listen", self.address, "--store", store, "--log-format", "json", *flags]

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stderr=log, env=os.environ)

    def end_by(self, how: signal.Signals) -> None:
        assert self._process.poll() is None, f"the server ended by itself: {self._log.read_text()[-4000:]}"
        self._process.send_signal(how)
        self._process.wait(PATIENCE_S)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


class Load:
    """Clients that drive sessions until they are told to stop."""

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self.tracks: list[Track] = []
        self.answered = threading.Event()
        """Set by every answer."""
        self.failures: list[BaseException] = []
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, random.Random(seed + n)), daemon=True)
            for n, work in enumerate([self._run, self._run, self._stream, self._batch, self._tasks])
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(3 * PATIENCE_S)
            assert not thread.is_alive(), "a client still waits for an answer"
        if self.failures:
            raise self.failures[0]

    def wait_for_progress(self) -> None:
        """Wait for an answer that comes from now on."""
        self.answered.clear()
        if not self.answered.wait(PATIENCE_S) and not self.failures:
            raise AssertionError(f"no answer in {PATIENCE_S:.0f} s")
        if self.failures:
            raise self.failures[0]

    def _guarded(self, work: Any, chance: random.Random) -> None:
        try:
            work(chance)
        except BaseException as failure:
            self.failures.append(failure)
            self.answered.set()

    def _record(self, track: Track, inputs: np.ndarray, outputs: np.ndarray) -> None:
        track.asked.append(inputs)
        track.outputs.append(outputs)
        self.answered.set()

    def _new(self, client: Client, model: str) -> Track:
        track = Track(client.session(model), model)
        self.tracks.append(track)
        return track

    def _turns(self, client: Client, chance: random.Random) -> Iterator[Track]:
        """Sessions in turn, new ones in the place of those that have run long enough."""
        tracks = [self._new(client, chance.choice(["accumulator", "copy"])) for _ in range(_SESSIONS_EACH)]
        while not self._stopping.is_set():
            index = chance.randrange(len(tracks))
            track = tracks[index]
            if track.num_steps > _STEPS_OF_A_SESSION:
                tracks[index] = self._new(client, track.model)
            elif chance.random() < 0.02:
                track.session.reset()
                track.asked.append(RESET)
            elif chance.random() < 0.02:
                tracks[index] = track.forked(track.session.fork())
                self.tracks.append(tracks[index])
            else:
                yield track

    def _run(self, chance: random.Random) -> None:
        with self._client() as client:
            for track in self._turns(client, chance):
                inputs = _inputs(track.model, chance)
                self._record(track, inputs, track.session.run(inputs))

    def _stream(self, chance: random.Random) -> None:
        with self._client() as client:
            for track in self._turns(client, chance):
                chunks = [_inputs(track.model, chance) for _ in range(12)]
                for chunk, outputs in zip(chunks, track.session.stream(chunks), strict=True):
                    self._record(track, chunk, outputs)

    def _batch(self, chance: random.Random) -> None:
        with self._client() as client:
            together = [self._new(client, "accumulator") for _ in range(_SESSIONS_EACH)]
            while not self._stopping.is_set():
                num_steps = chance.randint(1, _MOST_STEPS)
                inputs = np.stack([_inputs(track.model, chance, num_steps) for track in together])
                result = client.batch_step([track.session for track in together], inputs)
                assert not result.errors, result.errors
                for track, of_session, outputs in zip(together, inputs, result.outputs, strict=True):
                    self._record(track, of_session, outputs)

    def _tasks(self, chance: random.Random) -> None:
        async def task(client: AsyncClient, model: str) -> None:
            track = Track(await client.session(model), model)
            self.tracks.append(track)
            while not self._stopping.is_set():
                if track.num_steps > _STEPS_OF_A_SESSION:
                    track = Track(await client.session(model), model)
                    self.tracks.append(track)
                inputs = _inputs(model, chance)
                self._record(track, inputs, await track.session.run(inputs))

        async def tasks() -> None:
            async with AsyncClient(self._address, retry_for_s=_RETRY_FOR_S) as client:
                await asyncio.gather(*(task(client, model) for model in 2 * ("accumulator", "copy")))

        asyncio.run(tasks())

    def _client(self) -> Client:
        return Client(self._address, retry_for_s=_RETRY_FOR_S)


def _inputs(model: str, chance: random.Random, num_steps: int | None = None) -> np.ndarray:
    num_steps = num_steps or (_LONG_STEPS if chance.random() < 0.05 else chance.randint(1, _MOST_STEPS))
    generator = np.random.default_rng(chance.getrandbits(64))
    return generator.uniform(0, 1, (num_steps, _WIDTHS[model])).astype(np.float32)


def kill_again_and_again(
    store: str,
    name: str,
    directory: Path,
    num_kills: int,
    seed: int,
    time_limit_s: float = float("inf"),
    how: signal.Signals = signal.SIGKILL,
) -> Tally:
    """Load a server, kill it so many times, and count what that did to its sessions.

    Args:
        store: the URL of an empty store.
        name: of the store, for the table.
        directory: for the models and the log.
        num_kills: at most; fewer when the time is over.
        seed: of everything that is random here; what the kills hit is not repeatable all the same.
        time_limit_s: after which nobody is killed any more.
        how: SIGTERM to stop it in good order instead.
    """
    begin_s = time.monotonic()
    models = _small_models(directory / "models")
    server = KilledServer(
        models,
        store,
        directory / "server.log",
        "--snapshot-every-steps",
        "9",
        "--max-resident-sessions",
        "6",
        "--max-batch-size",
        "8",
        "--lease-s",
        "1",
        "--handover-timeout-s",
        "10",
    )
    chance = random.Random(seed)
    load = Load(server.address, seed)
    tally = Tally(name)
    server.start()
    load.start()
    try:
        while tally.kills < num_kills and time.monotonic() - begin_s < time_limit_s:
            if how == signal.SIGKILL and chance.random() < 0.15:
                time.sleep(chance.uniform(0, 1.5))  # while it starts
            else:
                load.wait_for_progress()
                time.sleep(chance.uniform(0, 0.4))  # at any moment of its work
            server.end_by(how)
            tally.kills += 1
            server.start()
        load.stop()
        with (
            _untouched_server(models) as untouched,
            Client(server.address, retry_for_s=_RETRY_FOR_S) as killed,
        ):
            _count(tally, load.tracks, killed, untouched)
    finally:
        server.end()
    tally.seconds = time.monotonic() - begin_s
    return tally


def _count(tally: Tally, tracks: list[Track], killed: Client, untouched: Client) -> None:
    """Hold every session, as the server has it after the last kill, against an unbroken run."""
    for track in tracks:
        session = killed.attach(track.session.session_id)
        state, next_step = session.state(), session.next_step
        outputs, unbroken_state = _unbroken(track, untouched)
        tally.sessions += 1
        tally.steps_answered += track.num_steps
        tally.steps_lost += max(0, track.num_steps - next_step)
        tally.steps_doubled += max(0, next_step - track.num_steps)
        tally.bits_differing += _differing_bits(np.concatenate([outputs[:0], *track.outputs]), outputs)
        for name, array in unbroken_state.items():
            tally.bits_differing += _differing_bits(state[name], array)


def _unbroken(track: Track, untouched: Client) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs and state of a run that nothing disturbs."""
    if track.model == "accumulator":
        total, rows = np.zeros(_WIDTHS[track.model], np.float32), []
        for asked in track.asked:
            if isinstance(asked, str):
                total = np.zeros_like(total)
                continue
            for row in asked:
                total = np.float32(0.5) * total + row
                rows.append(total)
        return np.array(rows, np.float32).reshape(-1, len(total)), {"sum": total}
    with untouched.session(track.model) as session:
        outputs = []
        for asked in track.asked:
            if isinstance(asked, str):
                session.reset()
            else:
                outputs.append(session.run(asked))
        return session.model.join(outputs), session.state()


def _differing_bits(some: np.ndarray, others: np.ndarray) -> int:
    assert some.shape == others.shape
    a, b = (np.frombuffer(array.tobytes(), np.uint8) for array in (some, others))
    return int(np.unpackbits(a ^ b).sum())


def _small_models(models: Path) -> Path:
    """Few and small ones, since what a start takes bounds how often a server can be killed."""
    step_models.write(models, step_models.accumulator(), "accumulator")
    shutil.copytree(ROOT / "models" / "copy", models / "copy")
    return models


@contextmanager
def _untouched_server(models: Path) -> Iterator[Client]:
    server = ServerProcess(models, "--device", "cpu")
    try:
        with Client(server.address) as client:
            yield client
    finally:
        server.stop()
