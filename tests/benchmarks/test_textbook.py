"""The reference that the step graph is held against computes the same function."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from benchmarks.textbook import TextbookStep
from export.step import CellStep
from training.model import NTMCell


@pytest.mark.parametrize("heads", [{}, {"num_read_heads": 3, "num_write_heads": 2, "shift_reach": 2}])
def test_the_textbook_step_and_the_cell_are_the_same_over_many_steps(heads):
    torch.manual_seed(0)
    cell = NTMCell(input_size=3, output_size=2, memory_rows=8, row_width=4, controller_size=6, **heads)
    step, textbook = CellStep(cell), TextbookStep(cell)
    state, books = [*step.initial_state(5).values()], [*textbook.initial_state(5).values()]

    with torch.no_grad():
        for inputs in torch.randn(30, 5, 3):
            output, *state = step(inputs, *state)
            textbook_output, *books = textbook(inputs, *books)

            assert_close(textbook_output, output)
            assert_close(books, [state[0].mT, *state[1:]])
