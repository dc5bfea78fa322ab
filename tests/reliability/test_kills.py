"""A server killed under load loses nothing and does nothing twice, to the bit; `tests/chaos` kills longer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.kills import kill_again_and_again
from tests.valkey import ValkeyServer

NUM_KILLS = 4


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/sessions.sqlite3"
        return
    server = ValkeyServer(tmp_path / "valkey", appendfsync="always")
    server.start()
    yield server.url
    server.stop()


def test_no_answered_step_is_lost_or_doubled_or_differs_when_the_server_is_killed_under_load(
    store: str, tmp_path: Path
) -> None:
    tally = kill_again_and_again(store, store, tmp_path, NUM_KILLS, seed=0)

    assert tally.kills == NUM_KILLS
    assert tally.steps_answered > 100
    assert tally.is_clean, tally
