import io
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from server import log
from tests.conftest import ROOT

SET_UP = "import structlog; from server import log; log.set_up('json'); logger = structlog.get_logger(); "


def run(program, **options):
    return subprocess.run(
        [sys.executable, "-c", SET_UP + program],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_a_log_on_a_full_disk_or_without_a_reader_stops_nothing():
    program = "[logger.error('x') for _ in range(100)]; print('done')"
    command = [sys.executable, "-c", SET_UP + program]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, timeout=60, check=False
        )
    closed = subprocess.run(
        [sys.executable, "-c", f"import sys, os; os.close(2); {SET_UP} {program}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )

    assert ended.stdout == closed.stdout == b"done\n"


def test_a_line_that_cannot_be_made_stops_nothing():
    program = """
class Bad:
    def __repr__(self): raise MemoryError
logger.error('bad', value=Bad())
logger.error('good')
"""
    ended = run("\n" + program)

    assert ended.returncode == 0
    assert "good" in ended.stderr


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_local_variables_and_is_short(form):
    program = """
def fail():
    tensor = 'what a caller sent' * 100_000
    raise ValueError('wrong')
try:
    fail()
except ValueError as error:
    logger.error('failed', exc_info=error)
"""
    ended = run("\n" + program if form == "json" else f"\nlog.set_up('console')\n{program}")

    assert "ValueError" in ended.stderr
    assert "what a caller sent" not in ended.stderr.replace("tensor = 'what a caller sent'", "")
    assert len(ended.stderr) < 4000


def test_lines_with_the_same_words_are_limited_and_the_next_says_how_many_were_left_out(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("server.log.monotonic", lambda: now_s)
    limit = log.RateLimit(most_lines=2, while_s=10.0)

    def passes(event, **fields):
        try:
            return limit(None, "error", {"event": event, "level": "error", **fields})
        except structlog.DropEvent:
            return None

    assert [passes("flood") is not None for _ in range(5)] == [True, True, False, False, False]
    assert passes("another") is not None
    assert passes("flood", audit=True) is not None
    now_s = 11.0
    assert passes("flood") == {"event": "flood", "level": "error", "num_left_out": 3}
    assert passes("flood") == {"event": "flood", "level": "error"}


def test_what_could_not_be_written_is_counted():
    class Stream(io.StringIO):
        is_full = True

        def write(self, text):
            if self.is_full:
                raise OSError
            return super().write(text)

    stream = Stream()
    writer = log.LossyWriter(stream)
    writer.msg("one")
    writer.msg("two")
    stream.is_full = False
    writer.msg("three")

    assert stream.getvalue() == "(2 lines before this one could not be written)\nthree\n"
