"""docs/layer.md: its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "layer.md"


def test_the_loop_of_the_page_learns():
    _, loop = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"NUM_UPDATES": 60}

    exec(compile(loop, str(PAGE), "exec"), names)

    assert names["loss"] < 2.2  # Whoever guesses pays log(10) = 2.3.
    assert names["model"].embedding.weight.grad.abs().sum() > 0


def test_the_calls_of_the_page_go_on_where_a_state_stands():
    from training.model import NTM

    calls, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"ntm": NTM(3, 2, memory_rows=8), "inputs": torch.randn(4, 2, 3)}

    exec(compile(calls, str(PAGE), "exec"), names)

    assert names["outputs"].shape == (4, 2, 2)
