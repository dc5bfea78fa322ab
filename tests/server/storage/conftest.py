"""Stores of every kind, each with a way to open it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.storage.interface import Store
from server.storage.memory import MemoryStore
from server.storage.redis import RedisStore
from server.storage.sqlite import SqliteStore
from tests.valkey import ValkeyServer

Opening = Callable[[], Store]


@pytest.fixture(params=["none", "sqlite", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opening(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Opening]:
    """Opens the test's store, once more at each call; what is open after the test is closed."""
    opened: list[Store] = []

    def open_once() -> Store:
        if kind == "none":
            return MemoryStore()
        if kind == "sqlite":
            return SqliteStore(tmp_path / "sessions.db", sync="normal")
        server: ValkeyServer = request.getfixturevalue("valkey")
        return RedisStore(server.url, lease_s=20.0, sync="normal", timeout_s=10.0)

    def open_and_remember() -> Store:
        opened.append(open_once())
        return opened[-1]

    yield open_and_remember
    for store in opened:
        store.close()


@pytest.fixture
def store(opening: Opening) -> Store:
    return opening()
