"""What is exported as heads and memory is the function that was trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from export.access import for_onnx_runtime, write, write_by_one_head
from export.step import CellStep
from training.model import NTMCell, PlainCell


@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"num_read_heads": 3, "num_write_heads": 2, "shift_reach": 2},
        {"num_read_heads": 1, "num_write_heads": 3, "shift_reach": 0},
        {"initial_memory": "constant", "initial_attention": "constant"},
    ],
)
def test_the_cell_for_onnx_runtime_computes_what_the_trained_one_does_over_many_steps(heads):
    torch.manual_seed(0)
    cell = NTMCell(
        input_size=3, output_size=2, memory_rows=8, row_width=4, controller_size=6, **heads
    ).double()
    trained, exported = CellStep(cell), CellStep(for_onnx_runtime(cell))
    ours = theirs = [*trained.initial_state(5).values()]

    with torch.no_grad():
        for inputs in torch.randn(30, 5, 3).double():
            expected, *theirs = trained(inputs, *theirs)
            output, *ours = exported(inputs, *ours)

            assert_close(output, expected, atol=1e-9, rtol=1e-9)
            assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_the_trained_cell_is_left_as_it_was():
    cell = NTMCell(input_size=3, output_size=2, memory_rows=8, row_width=4, controller_size=6)
    before = {name: value.clone() for name, value in cell.state_dict().items()}

    for_onnx_runtime(cell)

    assert_close(cell.state_dict(), before, atol=0, rtol=0)


def test_a_cell_without_memory_is_exported_as_it_is():
    cell = PlainCell(
        input_size=3,
        output_size=2,
        controller="lstm",
        controller_size=4,
        controller_layers=1,
        controller_scale=1,
    )

    assert for_onnx_runtime(cell) is cell


@pytest.mark.parametrize("num_heads", [2, 3])
def test_heads_that_neither_erase_nor_add_leave_every_bit_of_the_memory(num_heads):
    memory = torch.randn(2, 5, 8)
    weightings = torch.softmax(torch.randn(2, num_heads, 8), dim=-1)
    nothing = torch.zeros(2, num_heads, 5)

    assert torch.equal(write(memory, weightings, nothing, nothing.mT), memory)


def test_one_head_that_neither_erases_nor_adds_leaves_every_bit_of_the_memory():
    memory = torch.randn(2, 5, 8)
    weightings = torch.softmax(torch.randn(2, 1, 8), dim=-1)

    assert torch.equal(write_by_one_head(memory, weightings, torch.zeros(10), torch.zeros(10)), memory)


def test_a_head_beside_others_that_erases_all_of_one_row_leaves_exactly_what_it_adds():
    memory, add = torch.randn(1, 5, 8), torch.randn(1, 5, 1)
    weightings = torch.eye(8)[[3, 4]].unsqueeze(0)
    erase = torch.tensor([1.0, 0.0]).reshape(1, 2, 1).expand(1, 2, 5)

    written = write(memory, weightings, erase, F.pad(add, (0, 1)))

    expected = memory.clone()
    expected[:, :, 3] = add[:, :, 0]
    assert torch.equal(written, expected)


def test_one_head_that_erases_all_of_one_row_leaves_what_it_adds_and_a_rounding_error_of_what_was_there():
    memory, add = torch.randn(1, 5, 8), torch.randn(1, 5)
    on_row_3 = torch.eye(8)[3].reshape(1, 1, 8)

    written = write_by_one_head(memory, on_row_3, torch.ones(5), -add.flatten())

    expected = memory.clone()
    expected[:, :, 3] = add
    assert_close(written, expected, atol=1e-6, rtol=0)
    assert torch.equal(written[:, :, :3], memory[:, :, :3])
    assert torch.equal(written[:, :, 4:], memory[:, :, 4:])
