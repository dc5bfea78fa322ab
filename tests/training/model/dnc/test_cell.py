"""The whole cell: shapes, the start, independence of the batch, another number of rows."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.training.model.dnc.helpers import EACH
from training.model import DNCCell, RecurrentLayer, named_tensors, unroll, with_memory_rows, with_tensors

KINDS = [
    {},
    {"controller": "feedforward"},
    {"controller": "mgu", "controller_layers": 2},
    *({"num_read_heads": 3, "improvements": improvements} for improvements in EACH),
]


def make_cell(**kind) -> DNCCell:
    torch.manual_seed(0)
    sizes = {"input_size": 3, "output_size": 2, "memory_rows": 8, "row_width": 4, "controller_size": 6}
    return DNCCell(**(sizes | kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_the_shape_of_every_state_tensor(kind):
    cell = make_cell(**kind)
    state = cell.initial_state(5)

    outputs, next_state = cell.step(torch.randn(5, 3), state)

    num_reads = kind.get("num_read_heads", 1)
    assert outputs.shape == (5, 2)
    before, after = named_tensors(state), named_tensors(next_state)
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in after.items()}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("controller")}
    assert shapes == {
        "memory": (5, 4, 8),
        "usage": (5, 8),
        "write_weightings": (5, 1, 8),
        "precedence": (5, 8),
        "links": (5, 8, 8),
        "read_weightings": (5, num_reads, 8),
        "read_vectors": (5, num_reads, 4),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(kind, is_compiled):
    cell = make_cell(**kind)
    inputs = torch.randn(10, 4, 3)

    together, _ = unroll(cell, inputs, is_compiled=is_compiled)

    for row in range(4):
        alone, _ = unroll(cell, inputs[:, [row]], is_compiled=is_compiled)
        assert_close(alone, together[:, [row]], atol=1e-5, rtol=1e-4)


def test_a_sequence_cut_in_two_gives_the_same_because_all_memory_is_in_the_state():
    cell = make_cell(num_read_heads=2)
    inputs = torch.randn(12, 2, 3)

    whole, end = unroll(cell, inputs)
    first, state = unroll(cell, inputs[:5])
    state = with_tensors(cell.initial_state(2), named_tensors(state))
    second, last = unroll(cell, inputs[5:], state)

    assert_close(torch.cat([first, second]), whole)
    assert_close(named_tensors(last), named_tensors(end))


def test_gradients_reach_every_weight_and_the_inputs():
    cell = make_cell(num_read_heads=2)
    inputs = torch.randn(6, 2, 3, requires_grad=True)

    outputs, _ = unroll(cell, inputs, is_compiled=True)
    outputs.square().sum().backward()

    assert (inputs.grad.abs().amax(dim=-1) > 0).all()
    assert {name for name, weight in cell.named_parameters() if weight.grad is None} == set()


def test_a_cell_in_double_precision_steps_in_double_precision():
    cell = make_cell().double()

    outputs, state = unroll(cell, torch.randn(3, 2, 3).double())

    assert outputs.dtype == torch.float64
    assert {tensor.dtype for tensor in named_tensors(state).values()} == {torch.float64}


def test_a_cell_with_more_rows_is_a_copy_with_the_same_weights():
    cell = make_cell()

    larger = with_memory_rows(cell, 20)

    assert larger.initial_state(1).links.shape == (1, 20, 20)
    assert cell.initial_state(1).links.shape == (1, 8, 8)
    assert_close(larger.state_dict(), cell.state_dict())
    assert unroll(larger, torch.randn(3, 2, 3))[0].isfinite().all()


def test_under_autocast_the_memory_is_accessed_in_full_precision():
    cell = make_cell(num_read_heads=2)
    inputs = torch.randn(6, 2, 3)

    with torch.autocast("cpu", torch.float16):
        outputs, state = unroll(cell, inputs)
        outputs.float().square().sum().backward()

    assert state.memory.dtype == state.links.dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in cell.parameters())
    assert_close(outputs.float(), unroll(cell, inputs)[0], atol=2e-2, rtol=0)


def test_a_dnc_is_a_layer_of_sequences_of_unequal_length():
    layer = RecurrentLayer(make_cell(num_read_heads=2), batch_first=True)
    inputs = torch.randn(3, 7, 3)

    outputs, end = layer(inputs, lengths=[2, 7, 4])

    for row, length in enumerate([2, 7, 4]):
        alone, state = layer(inputs[row, :length])
        assert_close(outputs[row, :length], alone)
        assert (outputs[row, length:] == 0).all()
        assert_close(end.links[row], state.links)
