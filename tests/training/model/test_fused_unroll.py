"""A whole unrolling as one operation gives what the cell gives step by step, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from training.model import NTMCell, PlainCell, Unrolled, fused_unroll, unroll

KINDS = [
    {},
    {"num_read_heads": 2, "num_write_heads": 3, "shift_reach": 2},
    {"initial_memory": "learned", "initial_attention": "learned"},
    {"initial_memory": "constant", "initial_attention": "constant"},
    {"architecture": "plain", "controller_layers": 1},
    {"architecture": "plain", "controller_layers": 3},
]


def make_cell(architecture="ntm", **kind) -> NTMCell | PlainCell:
    torch.manual_seed(0)
    if architecture == "plain":
        kind = {"controller": "lstm", "controller_scale": 5.0} | kind
        return PlainCell(input_size=3, output_size=2, controller_size=7, **kind)
    return NTMCell(input_size=3, output_size=2, memory_rows=12, row_width=5, controller_size=7, **kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_outputs_and_all_gradients_are_those_of_the_steps_in_double_precision(kind, num_steps):
    cell, exact = make_cell(**kind), make_cell(**kind).double()
    inputs = torch.randn(num_steps, 4, 3)
    grad_outputs = torch.randn(num_steps, 4, 2)

    outputs = fused_unroll.unroll_fused(cell, inputs)
    expected, _ = unroll(exact, inputs.double())
    outputs.backward(grad_outputs)
    expected.backward(grad_outputs.double())

    assert_close(outputs.double(), expected, atol=1e-5, rtol=1e-5)
    for (name, weight), reference in zip(cell.named_parameters(), exact.parameters(), strict=True):
        largest = float(reference.grad.abs().max())
        assert_close(weight.grad.double(), reference.grad, atol=1e-4 * largest, rtol=1e-3, msg=name)


def test_without_a_gradient_it_gives_the_same():
    cell, inputs = make_cell(), torch.randn(6, 2, 3)

    with torch.no_grad():
        outputs = fused_unroll.unroll_fused(cell, inputs)

    assert_close(outputs, unroll(cell, inputs)[0].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "can_fuse"),
    [
        ({}, True),
        ({"controller_layers": 2}, False),
        ({"controller": "gru"}, False),
        ({"controller": "feedforward"}, False),
        ({"architecture": "plain", "controller_layers": 2}, True),
        ({"architecture": "plain", "controller": "mgu", "controller_layers": 1}, False),
        ({"architecture": "plain", "controller": "gru", "controller_layers": 1}, False),
    ],
)
def test_it_is_for_lstm_controllers_and_other_cells_are_unrolled_step_by_step(kind, can_fuse):
    cell, inputs = make_cell(**kind), torch.randn(6, 2, 3)
    expected, _ = unroll(cell, inputs)

    outputs = Unrolled(cell, is_compiled=True)(inputs)

    assert fused_unroll.can_fuse(cell) == can_fuse
    assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
