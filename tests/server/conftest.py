"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.server.helpers import Caller, Start


@pytest_asyncio.fixture(params=["none", "sqlite"])
async def caller(
    serve: Start, models: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Caller]:
    server, address = await serve(
        models,
        store="none" if request.param == "none" else f"sqlite:///{tmp_path}/data/sessions.sqlite3",
        snapshot_every_steps=5,
        max_resident_sessions=8,
        max_batch_size=4,
        max_steps_per_message=16,
        retry_window_steps=16,
        max_pending_messages=6,
        max_message_bytes=128 * 1024,
    )
    caller = Caller(server, address)
    yield caller
    await caller.channel.close()
