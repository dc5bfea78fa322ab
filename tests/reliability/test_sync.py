"""What --sync promises, seen from outside: the system calls of a real server, traced while it answers.

At `full` the log has been forced to disk before an answer leaves, so that not even a power failure takes it back.
Pulling the plug is not for a test, but the order of the calls is what it depends on.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ntm import Client
from tests import step_models
from tests.conftest import ServerProcess

MARKERS = [b"fsn0", b"fsn1", b"fsn2", b"fsn3", b"fsn4"]
"""Four bytes each that are a sound float32, and easy to find in what is written and sent."""

SENDS = {"sendmsg", "sendto", "write", "writev"}
"""How an answer may leave, whatever transport carries it."""

CALL = re.compile(r"^(?P<thread>\d+) +(?:<\.\.\. )?(?P<name>\w+)(?P<rest>.*)$")


def why_not_traced() -> str:
    """Why system calls cannot be traced here, or ""."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=20)
    return "" if tried.returncode == 0 else f"strace may not trace: {tried.stderr.strip()[-100:]}"


pytestmark = pytest.mark.skipif(bool(why_not_traced()), reason=why_not_traced())


def events(trace: Path) -> Iterator[tuple[str, str]]:
    """What began and what ended, in order: ("write", its text), ("synced", ""), ("send", its text)."""
    begun: dict[str, str] = {}
    """By thread, the call that another thread's output has cut in two."""
    for line in trace.read_text(errors="replace").splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        thread, name, rest = match["thread"], match["name"], match["rest"]
        if rest.endswith("<unfinished ...>"):
            begun[thread] = rest
            # What is sent may be on its way when the call begins; what is written is there when it ends.
            if name in SENDS:
                yield "send", rest
            continue
        is_second_half = rest.startswith(" resumed>")
        text = begun.pop(thread, "") + rest if is_second_half else rest
        if name in SENDS:
            if not is_second_half:
                yield "send", text
        elif "-wal>" in text:
            yield ("write" if name == "pwrite64" else "synced"), text


def syncs_between(trace: Path, marker: bytes) -> int:
    """How often the log was forced to disk after a step was written to it and before its answer left."""
    text = marker.decode()
    num_syncs, is_written = 0, False
    for what, content in events(trace):
        if what == "write" and text in content:
            is_written, num_syncs = True, 0
        elif what == "synced" and is_written:
            num_syncs += 1
        elif what == "send" and text in content:
            assert is_written, "an answer left before its step was written"
            return num_syncs
    raise AssertionError(f"no answer with {marker!r} was seen")


@pytest.fixture
def trace(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> Callable[[str], Path]:
    """Run some steps on a server of some --sync; returns the trace of its system calls."""
    step_models.write(tmp_path / "models", step_models.accumulator())

    def run(sync: str) -> Path:
        server = start_server(tmp_path / "models", "--sync", sync, store=f"sqlite:///{tmp_path}/s.sqlite3")
        trace = tmp_path / "trace"
        command = ["strace", "-f", "-y", "-s", "20000", "-o", str(trace), "-p", str(server.pid)]
        command += ["-e", "trace=pwrite64,fsync,fdatasync," + ",".join(SENDS)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"strace may not attach to another process here: {said.strip()}")
        with Client(server.address) as client:
            session = client.session("test")
            for marker in MARKERS:
                session.reset()  # so that the output is the input
                session.step(np.frombuffer(3 * marker, np.float32))
        server.stop()
        tracer.wait(timeout=30)
        return trace

    return run


def test_at_sync_full_every_answer_leaves_after_its_step_was_forced_to_disk(
    trace: Callable[[str], Path],
) -> None:
    of_server = trace("full")

    assert all(syncs_between(of_server, marker) >= 1 for marker in MARKERS)


def test_at_sync_normal_an_answer_does_not_wait_for_the_disk(trace: Callable[[str], Path]) -> None:
    of_server = trace("normal")

    assert [syncs_between(of_server, marker) for marker in MARKERS] == [0] * len(MARKERS)
