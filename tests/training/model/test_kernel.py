"""The compiled kernel computes what the torch operations compute, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from training.model import NTMCell, access, kernel, unroll
from training.model.heads import HeadSizes

SIZES = [
    (HeadSizes(1, 1, 20, 1), 128),
    (HeadSizes(2, 3, 6, 2), 9),
    (HeadSizes(3, 1, 5, 0), 8),
    (HeadSizes(1, 2, 4, 1), 3),
]


def values_and_gradients(access_memory, sizes: HeadSizes, num_rows: int, dtype: torch.dtype, scale: float):
    generator = torch.Generator().manual_seed(0)
    requested = scale * torch.randn(3, sizes.num_requested, generator=generator)
    memory = torch.randn(3, sizes.row_width, num_rows, generator=generator)
    memory[0] = 1e-6  # As a sequence finds it.
    memory[1, :, 0] = 0
    previous = torch.softmax(scale * torch.randn(3, sizes.num_heads, num_rows, generator=generator), dim=-1)
    previous[2] = 0
    previous[2, :, 1] = 1
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (requested, memory, previous)]
    outputs = access_memory(*inputs, sizes)
    loss = sum(
        (output * torch.randn(output.shape, generator=generator).to(dtype)).sum() for output in outputs
    )
    loss.backward()
    return outputs, [tensor.grad for tensor in inputs]


@pytest.mark.parametrize(("sizes", "num_rows"), SIZES)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_values_and_gradients_are_those_of_the_torch_operations_in_double_precision(sizes, num_rows, scale):
    outputs, gradients = values_and_gradients(kernel.compiled_access, sizes, num_rows, torch.float32, scale)
    expected, expected_gradients = values_and_gradients(
        access.access_memory, sizes, num_rows, torch.float64, scale
    )

    for ours, theirs in zip(outputs, expected, strict=True):
        assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        for row, expected_row in zip(ours.double(), theirs, strict=True):
            assert_close(row, expected_row, atol=1e-4 * float(expected_row.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(("sizes", "num_rows"), SIZES[1:])
def test_its_gradients_are_those_of_finite_differences(sizes, num_rows):
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    requested = torch.randn(2, sizes.num_requested, **options)
    memory = torch.randn(2, sizes.row_width, num_rows, **options)
    previous = torch.softmax(torch.randn(2, sizes.num_heads, num_rows, **options), dim=-1)
    inputs = [tensor.requires_grad_() for tensor in (requested, memory, previous)]

    assert gradcheck(lambda *tensors: tuple(kernel.compiled_access(*tensors, sizes)), inputs)


def test_a_whole_sequence_gives_the_same_loss_and_the_same_gradients():
    torch.manual_seed(0)
    cell = NTMCell(input_size=9, output_size=8)
    inputs = torch.randn(12, 4, 9)

    gradients = []
    for cell.access in (access.access_memory, kernel.compiled_access):
        cell.zero_grad()
        outputs, _ = unroll(cell, inputs)
        outputs.square().mean().backward()
        gradients.append([outputs.detach(), *(weight.grad.clone() for weight in cell.parameters())])

    for theirs, ours in zip(*gradients, strict=True):
        assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_a_number_that_is_not_finite_is_passed_on_and_not_hidden():
    sizes = HeadSizes(1, 1, 4, 1)
    requested = torch.zeros(1, sizes.num_requested)
    requested[0, 0] = float("nan")

    weightings, _, _ = kernel.compiled_access(
        requested, torch.ones(1, 4, 8), torch.full((1, 2, 8), 1 / 8), sizes
    )

    assert weightings[0, 0].isnan().all()
    assert weightings[0, 1].isfinite().all()
