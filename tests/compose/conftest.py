"""Fixtures for the tests with a container engine, and the table of results that they print at the end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compose.compose import Compose, docker
from tests.compose.load import Account
from tests.conftest import ROOT

_ROWS: list[tuple[str, ...]] = []


@pytest.fixture(scope="session", autouse=True)
def images() -> None:
    """The engine answers, and the images are built from this checkout."""
    assert "Server" in docker("version", check=False), (
        "no container engine answers `docker version`: start one"
    )
    docker("compose", "--progress", "quiet", "--profile", "demo", "build", "server", "demo")


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of secret files."""
    directory = tmp_path_factory.mktemp("secrets")
    environment = {**os.environ, "NTM_SECRETS": str(directory)}
    subprocess.run([ROOT / "deploy" / "secrets.sh"], cwd=ROOT, env=environment, check=True)
    return directory


@pytest.fixture(scope="module")
def start_project(secrets: Path) -> Iterator[Callable[..., Compose]]:
    """Name projects, and take them down after the module, whatever they came to."""
    projects: list[Compose] = []

    def start(name: str, **settings: str) -> Compose:
        project = Compose(f"ntm-test-{name}", secrets, **settings)
        projects.append(project)
        project.down()
        return project

    yield start
    for project in projects:
        project.down()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str, Account, str], None]:
    """Add a row to the table."""

    def add(what: str, account: Account, moved: str) -> None:
        counts = (account.answered, len(account.failed), account.lost, account.doubled, account.wrong)
        _ROWS.append((what, *map(str, counts), f"{account.longest_s:.1f}", moved))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, as it stands in docs/operations.md."""
    if _ROWS:
        terminalreporter.section("under load")
        heads = (
            "What happened",
            "Steps",
            "Calls failed",
            "Lost",
            "Doubled",
            "Wrong",
            "Longest stall, s",
            "Moved",
        )
        terminalreporter.line("| " + " | ".join(heads) + " |")
        terminalreporter.line("|---|---|---|---|---|---|---|---|")
        for row in _ROWS:
            terminalreporter.line("| " + " | ".join(row) + " |")
