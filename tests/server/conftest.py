"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.server.helpers import Caller, Start


@pytest_asyncio.fixture(params=["none", "sqlite"])
async def caller(
    serve: Start, models: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Caller]:
    async with _calling(serve, models, tmp_path, request.param) as caller:
        yield caller


@pytest_asyncio.fixture(params=["none", "sqlite"])
async def roomy_caller(
    serve: Start, models: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Caller]:
    """Of a server with room for more sessions, and more calls at once, than a test needs."""
    async with _calling(serve, models, tmp_path, request.param, num_sessions=32, max_batch_size=8) as caller:
        yield caller


@asynccontextmanager
async def _calling(
    serve: Start, models: Path, tmp_path: Path, store: str, num_sessions: int = 8, max_batch_size: int = 4
) -> AsyncIterator[Caller]:
    server, address = await serve(
        models,
        store="none" if store == "none" else f"sqlite:///{tmp_path}/data/sessions.sqlite3",
        snapshot_every_steps=5,
        max_resident_sessions=num_sessions,
        max_batch_size=max_batch_size,
        max_steps_per_message=16,
        retry_window_steps=16,
        max_pending_messages=num_sessions - 2,
        max_message_bytes=128 * 1024,
    )
    caller = Caller(server, address)
    yield caller
    await caller.channel.close()
