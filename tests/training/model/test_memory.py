"""Reading and writing against loops written from the paper's equations."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from training.model.memory import read, write


@pytest.mark.parametrize(("batch", "heads", "rows", "width"), [(1, 1, 3, 2), (2, 3, 6, 4)])
def test_read_is_the_weighted_mean_of_equation_2(batch, heads, rows, width):
    torch.manual_seed(0)
    memory, weightings = torch.randn(batch, width, rows), torch.rand(batch, heads, rows)

    result = read(memory, weightings)

    for b in range(batch):
        for h in range(heads):
            for m in range(width):
                expected = sum(float(weightings[b, h, i] * memory[b, m, i]) for i in range(rows))
                assert float(result[b, h, m]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("batch", "heads", "rows", "width"), [(1, 1, 3, 2), (2, 3, 6, 4)])
def test_write_erases_with_every_head_then_adds_as_in_equations_3_and_4(batch, heads, rows, width):
    torch.manual_seed(1)
    memory, weightings = torch.randn(batch, width, rows), torch.rand(batch, heads, rows)
    erase, add = torch.rand(batch, width, heads), torch.randn(batch, width, heads)

    result = write(memory, weightings, erase, add)

    for b in range(batch):
        for i in range(rows):
            for m in range(width):
                expected = float(memory[b, m, i])
                for h in range(heads):
                    expected *= 1 - float(weightings[b, h, i] * erase[b, m, h])
                for h in range(heads):
                    expected += float(weightings[b, h, i] * add[b, m, h])
                assert float(result[b, m, i]) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), row=st.integers(0, 5))
def test_a_head_that_erases_all_of_one_row_leaves_exactly_what_it_adds(seed, row):
    torch.manual_seed(seed)
    memory, add = 100 * torch.randn(1, 4, 6), torch.randn(1, 4, 1)
    attention = torch.zeros(1, 1, 6)
    attention[..., row] = 1

    written = write(memory, attention, torch.ones(1, 4, 1), add)

    expected = memory.clone()
    expected[..., row] = add[..., 0]
    assert torch.equal(written, expected)


def test_the_order_of_write_heads_does_not_matter():
    torch.manual_seed(2)
    memory, weightings = torch.randn(2, 4, 6), torch.rand(2, 3, 6)
    erase, add = torch.rand(2, 4, 3), torch.randn(2, 4, 3)
    order = [2, 0, 1]

    swapped = write(memory, weightings[:, order], erase[..., order], add[..., order])

    assert_close(swapped, write(memory, weightings, erase, add))
