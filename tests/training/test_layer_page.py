"""docs/layer.md: its code runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.conftest import ServerProcess
from training.model import NTM

PAGE = Path(__file__).parents[2] / "docs" / "layer.md"
CALLS, LOOP, EXPORT, SERVE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(code: str, names: dict) -> dict:
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_calls_of_the_page_go_on_where_a_state_stands():
    names = run(CALLS, {"ntm": NTM(3, 2, memory_rows=8), "inputs": torch.randn(4, 2, 3)})

    assert names["outputs"].shape == (4, 2, 2)


def test_the_loop_of_the_page_learns_and_its_model_is_exported_and_served_as_torch_runs_it(
    tmp_path: Path, monkeypatch, start_server: Callable[..., ServerProcess]
):
    monkeypatch.chdir(tmp_path)

    names = run(LOOP, {"NUM_UPDATES": 60})
    assert names["loss"] < 2.2  # Whoever guesses pays log(10) = 2.3.
    assert names["model"].embedding.weight.grad.abs().sum() > 0

    run(EXPORT, names)
    assert names["report"].num_steps == 21

    server = start_server(tmp_path / "models")
    run(SERVE.replace("127.0.0.1:50051", server.address), names)
    with torch.no_grad():
        expected, _ = names["model"](names["symbols"])
    np.testing.assert_array_equal(names["said"], expected[-5:, 0].argmax(dim=-1))
