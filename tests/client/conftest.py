"""One server for the client's tests, and routers in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests import step_models
from tests.client.helpers import Router
from tests.conftest import ServerProcess


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """Clients run on the loop that most programs have; their server is a process of its own."""
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for the tests that only need one to be there."""
    models = tmp_path_factory.mktemp("models")
    for make in (step_models.accumulator, step_models.delay_line, step_models.many_layouts):
        step_models.write(models, make(), make.__name__)
    server = ServerProcess(
        models, "--max-resident-sessions", "50", "--max-steps-per-message", "20", "--retry-window-steps", "50"
    )
    yield server.address
    server.stop()


@pytest.fixture
def router(address: str) -> Iterator[Router]:
    """In front of the server."""
    router = Router(address)
    yield router
    router.close()
