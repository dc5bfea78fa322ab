"""Stores of every kind, each with a way to open it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.store import Store
from server.store.none import NoStore
from server.store.sqlite import SqliteStore

Opening = Callable[[], Store]


@pytest.fixture(params=["none", "sqlite"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opening(kind: str, tmp_path: Path) -> Iterator[Opening]:
    """Opens the test's store, once more at each call; what is open after the test is closed."""
    opened: list[Store] = []

    def open_once() -> Store:
        opened.append(NoStore() if kind == "none" else SqliteStore(tmp_path / "sessions.db", sync="normal"))
        return opened[-1]

    yield open_once
    for store in opened:
        store.close()


@pytest.fixture
def store(opening: Opening) -> Store:
    return opening()
