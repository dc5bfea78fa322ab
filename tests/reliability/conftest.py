"""Stores and servers for these tests, and a profile of Hypothesis for those that have more time than `make test`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import settings

from tests.reliability.helpers import Restart, Restarted
from tests.server.helpers import Start
from tests.valkey import ValkeyServer

settings.register_profile("chaos", settings())


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path / "valkey", appendonly="no")
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a durable store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sessions.sqlite3"
    return str(request.getfixturevalue("valkey").url)


@pytest_asyncio.fixture
async def restart(serve: Start, models: Path) -> AsyncIterator[Restart]:
    """Start a server with frequent snapshots; end it to start another on its store."""
    callers: list[Restarted] = []

    async def again(**options: Any) -> Restarted:
        options = {"sync": "normal", "snapshot_every_steps": 6, "max_batch_size": 4} | options
        callers.append(Restarted(*await serve(models, **options)))
        return callers[-1]

    yield again
    for caller in callers:
        await caller.channel.close()
