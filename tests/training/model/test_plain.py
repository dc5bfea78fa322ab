"""A controller alone has the cell's interface."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from training.model import PlainCell, named_tensors, unroll, with_tensors


def make_cell(kind: str = "lstm", num_layers: int = 2) -> PlainCell:
    torch.manual_seed(0)
    return PlainCell(
        input_size=3,
        output_size=2,
        controller=kind,
        controller_size=5,
        controller_layers=num_layers,
        controller_scale=5.0,
    )


@pytest.mark.parametrize("kind", ["lstm", "gru", "mgu"])
def test_all_it_remembers_is_in_its_state(kind):
    cell = make_cell(kind)
    inputs = torch.randn(9, 4, 3)

    whole, _ = unroll(cell, inputs)
    first, middle = unroll(cell, inputs[:4])
    second, _ = unroll(cell, inputs[4:], with_tensors(middle, named_tensors(middle)))

    assert whole.shape == (9, 4, 2)
    assert torch.equal(torch.cat([first, second]), whole)


def test_the_layers_of_its_state_are_numbered_and_a_single_one_is_not():
    assert list(named_tensors(make_cell("lstm", 2).initial_state(1))) == [
        "controller_1_hidden",
        "controller_1_cell",
        "controller_2_hidden",
        "controller_2_cell",
    ]
    assert list(named_tensors(make_cell("gru", 1).initial_state(1))) == ["controller_hidden"]


def test_the_output_is_linear_in_the_highest_layers_output():
    cell = make_cell()
    inputs, state = torch.randn(4, 3), cell.initial_state(4)

    outputs, _ = cell.step(inputs, state)

    controlled, _ = cell.controller.step([inputs], state.controller)
    assert_close(outputs, controlled @ cell.output.weight.T + cell.output.bias)
