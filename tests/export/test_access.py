"""What is exported as heads and memory is the function that was trained."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from export.access import for_onnx_runtime, write
from export.step import Step
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
    trained, exported = Step(cell), Step(for_onnx_runtime(cell))
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


@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_heads_that_neither_erase_nor_add_leave_every_bit_of_the_memory(num_heads):
    memory = torch.randn(2, 5, 8)
    weightings = torch.softmax(torch.randn(2, num_heads, 8), dim=-1)
    nothing = torch.zeros(2, num_heads, 5)

    assert torch.equal(write(memory, weightings, nothing, nothing.mT), memory)


def test_a_head_that_attends_to_one_row_and_erases_all_of_it_leaves_exactly_what_it_adds():
    memory, add = torch.randn(1, 5, 8), torch.randn(1, 5, 1)
    on_row_3 = torch.eye(8)[3].reshape(1, 1, 8)

    written = write(memory, on_row_3, torch.ones(1, 1, 5), add)

    expected = memory.clone()
    expected[:, :, 3] = add[:, :, 0]
    assert torch.equal(written, expected)
