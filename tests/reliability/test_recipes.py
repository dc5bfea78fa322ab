"""The recipes of docs/reliability.md do what they say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntm import Client
from tests import step_models
from tests.conftest import ROOT, ServerProcess

RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()


def program(heading: str) -> str:
    """The Python under a heading."""
    section = RELIABILITY.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


@pytest.fixture
def start(start_server: Callable[..., ServerProcess], tmp_path: Path) -> Callable[[str], str]:
    """Start a server with a store of its own; returns its address."""
    step_models.write(tmp_path / "models", step_models.accumulator())
    return lambda name: (
        start_server(tmp_path / "models", store=f"sqlite:///{tmp_path}/{name}.sqlite3").address
    )


def test_beam_search_by_forking_finds_what_trying_everything_finds(start: Callable[[str], str]) -> None:
    choices = np.array([[1, 0, 0], [0, 1, 0], [-0.5, 0.25, 0]], np.float32)

    def score(output: np.ndarray) -> float:
        return float(output @ np.array([0.3, -0.2, 1.0], np.float32)) * (1 if output[1] < 0.9 else -1)

    names: dict[str, Any] = {}
    exec(program("Beam search by forking"), names)
    with Client(start("one")) as client:
        best, path = names["beam_search"](client, "test", choices, score, width=27, num_steps=3)
        left = list(client.sessions())

    def of_path(indices: tuple[int, ...]) -> float:
        total, scores = np.zeros(3, np.float32), 0.0
        for index in indices:
            total = np.float32(0.5) * total + choices[index]
            scores += score(total)
        return scores

    expected = max(itertools.product(range(3), repeat=3), key=of_path)
    assert tuple(path) == expected
    assert best == pytest.approx(of_path(expected))
    assert not left


def test_sessions_move_to_another_server(start: Callable[[str], str]) -> None:
    inputs = np.random.default_rng(0).uniform(-1, 1, (6, 10, 3)).astype(np.float32)
    names: dict[str, Any] = {}
    exec(program("Move live sessions"), names)

    with Client(start("old")) as old, Client(start("new")) as new:
        sessions = [old.session("test", session_id=f"s{index}") for index in range(len(inputs))]
        for session, of_session in zip(sessions, inputs, strict=True):
            session.run(of_session[:6])
        names["move"](old, new)

        assert not list(old.sessions())
        for session, of_session in zip(sessions, inputs, strict=True):
            moved = new.attach(session.session_id)
            assert moved.next_step == 6
            total = np.zeros(3, np.float32)
            for row in of_session:
                total = np.float32(0.5) * total + row
            moved.run(of_session[6:])
            np.testing.assert_array_equal(moved.state()["sum"], total)
