"""A SQLite store whose log was damaged between a kill and the next start: what it has lost is never lost in silence.

The server is a real one, killed with messages that it has answered and that only the log has.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ntm import Client, NotFoundError
from server.errors import StoreSettingsError
from server.storage.sqlite import SqliteStore
from tests.chaos.kills import PATIENCE_S, KilledServer
from tests.conftest import ROOT
from tests.server.helpers import accumulated, random_inputs

INPUTS = random_inputs(40)
FRAME_BYTES = 24 + 8192
HEADER_BYTES = 32


class Killed:
    """A store that a server has left when it was killed, and its files."""

    def __init__(self, models: Path, directory: Path, sync: str) -> None:
        self.models, self.directory = models, directory
        self.url = f"sqlite:///{directory}/sessions.sqlite3"
        self.log = directory / "server.log"
        self.server = KilledServer(models, self.url, self.log, "--sync", sync)
        self.wal, self.shm, self.lock = (
            directory / f"sessions.sqlite3-{kind}" if kind != "lock" else directory / "sessions.sqlite3.lock"
            for kind in ("wal", "shm", "lock")
        )
        self.server.start()
        with Client(self.server.address, retry_for_s=PATIENCE_S) as client:
            for name in ("first", "second"):
                session = client.session("accumulator", session_id=name)
                for start in range(0, 20, 5):
                    session.run(INPUTS[start : start + 5])
        self.server.end_by(signal.SIGKILL)

    def start_refused(self) -> str:
        """What a server says that does not start."""
        command = [sys.executable, "-m", "server", "--models", str(self.models), "--device", "cpu"]
        command += ["--listen", "127.0.0.1:0", "--store", self.url]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def events(self, text: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if text in line["event"]]


@pytest.fixture(params=["normal", "full"])
def killed(models: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Killed:
    return Killed(models, tmp_path, request.param)


def flip_a_bit(place: float) -> Callable[[Killed], None]:
    """In a frame of the log, of those that are there."""

    def flip(killed: Killed) -> None:
        content = bytearray(killed.wal.read_bytes())
        frame = int((len(content) - HEADER_BYTES) // FRAME_BYTES * place)
        content[HEADER_BYTES + frame * FRAME_BYTES + 24 + 100] ^= 4
        killed.wal.write_bytes(content)

    return flip


def cut(killed: Killed) -> None:
    content = killed.wal.read_bytes()
    killed.wal.write_bytes(content[: len(content) - FRAME_BYTES // 2])


def remove_log(killed: Killed) -> None:
    killed.wal.unlink()


def remove_log_and_index(killed: Killed) -> None:
    killed.wal.unlink()
    killed.shm.unlink()


def flip_the_header(killed: Killed) -> None:
    content = bytearray(killed.wal.read_bytes())
    content[17] ^= 1
    killed.wal.write_bytes(content)


DAMAGE = {
    "a bit flipped in the first frame": flip_a_bit(0),
    "a bit flipped in the middle": flip_a_bit(0.5),
    "a bit flipped in the last frame": flip_a_bit(0.999),
    "a bit flipped in the header": flip_the_header,
    "cut": cut,
    "removed": remove_log,
    "removed with its index": remove_log_and_index,
}


def test_a_log_that_has_lost_what_was_answered_is_refused_until_it_is_back_or_the_loss_is_accepted(
    killed: Killed,
) -> None:
    files = [killed.directory / f"sessions.sqlite3{end}" for end in ("", "-wal", "-shm", ".lock")]
    kept = killed.directory / "kept"
    kept.mkdir()
    for file in files:
        shutil.copy2(file, kept)

    for name, damage in DAMAGE.items():
        damage(killed)
        for _ in range(2):  # a refused start must not make it good
            with pytest.raises(StoreSettingsError, match=r"commits to .* are lost") as refused:
                SqliteStore(killed.directory / "sessions.sqlite3", "normal")
            assert f"remove {killed.lock}" in str(refused.value), name
        for file in files:
            shutil.copy2(kept / file.name, file)

    killed.server.start()
    try:
        with Client(killed.server.address, retry_for_s=PATIENCE_S) as client:
            for name in ("first", "second"):
                outputs = client.attach(name).run(INPUTS[20:])
                np.testing.assert_array_equal(outputs, accumulated(INPUTS)[20:])
    finally:
        killed.server.end()


def test_a_loss_that_is_accepted_is_said_in_the_log_and_sessions_go_on_from_what_is_left(
    killed: Killed,
) -> None:
    remove_log_and_index(killed)
    assert "are lost" in killed.start_refused()
    killed.lock.unlink()

    killed.server.start()
    try:
        with Client(killed.server.address, retry_for_s=PATIENCE_S) as client:
            with pytest.raises(NotFoundError):
                client.attach("first").run(INPUTS[20:])
            np.testing.assert_array_equal(
                client.session("accumulator", session_id="first").run(INPUTS), accumulated(INPUTS)
            )
    finally:
        killed.server.end()

    [event] = killed.events("not closed in good order")
    assert event["level"] == "warning"


def test_after_a_power_failure_the_end_of_the_log_may_be_gone_with_sync_normal_alone_and_is_said(
    killed: Killed,
) -> None:
    kind, durability, _, num_commits = killed.lock.read_text().split()
    killed.lock.write_text(f"{kind} {durability} another-boot {num_commits}\n")
    cut(killed)

    if durability == "power":
        assert "are lost" in killed.start_refused()
        return
    killed.server.start()
    try:
        with Client(killed.server.address, retry_for_s=PATIENCE_S) as client:
            assert client.attach("first").run(INPUTS[20:]).shape == (20, 3)
    finally:
        killed.server.end()

    [event] = killed.events("before the machine went down")
    assert event["level"] == "warning"
    assert event["num_lost"] == 1


def test_a_server_that_was_killed_and_whose_log_is_whole_starts_without_a_warning(killed: Killed) -> None:
    for _ in range(2):
        killed.server.start()
        with Client(killed.server.address, retry_for_s=PATIENCE_S) as client:
            assert client.attach("first").next_step == 20
        killed.server.end_by(signal.SIGKILL)

    assert not killed.events("commits")
    assert not killed.events("good order")


def test_a_store_that_was_closed_in_good_order_can_be_restored_from_a_backup(
    models: Path, tmp_path: Path
) -> None:
    killed = Killed(models, tmp_path, "full")
    for name in ("first", "first-again"):
        killed.server.start()
        with Client(killed.server.address, retry_for_s=PATIENCE_S) as client:
            client.session("accumulator", session_id=f"made-{name}")
        killed.server.end_by(signal.SIGTERM)
        database = tmp_path / "sessions.sqlite3"
        if name == "first":
            shutil.copy2(database, tmp_path / "backup")
    assert not killed.wal.exists()
    assert killed.lock.read_bytes() == b""

    shutil.copy2(tmp_path / "backup", database)
    killed.server.start()
    try:
        with Client(killed.server.address, retry_for_s=PATIENCE_S) as client:
            assert {s.session_id for s in client.sessions()} == {"first", "second", "made-first"}
    finally:
        killed.server.end()
