"""The compiled kernel computes what the torch operations compute, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.training.model.dnc.helpers import EACH, empty, in_use
from training.model import DNCCell, unroll
from training.model.dnc import access, kernel
from training.model.dnc.access import Accessed
from training.model.dnc.heads import DNCSizes


def values_and_gradients(access_memory, sizes: DNCSizes, before: Accessed, scale: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    requested = scale * torch.randn(len(before.memory), sizes.num_requested, generator=generator)
    inputs = [tensor.float().to(dtype).requires_grad_() for tensor in (requested, *before[:-1])]
    outputs = access_memory(inputs[0], Accessed(*inputs[1:], before.read_vectors), sizes)
    loss = sum((part * torch.randn(part.shape, generator=generator).to(dtype)).sum() for part in outputs)
    loss.backward()
    return outputs, [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("improvements", EACH)
@pytest.mark.parametrize(
    ("num_reads", "num_rows", "scale"), [(1, 8, 0.5), (3, 9, 3.0), (2, 1, 1.0), (1, 16, 6.0)]
)
@pytest.mark.parametrize("start", [empty, in_use])
def test_values_and_gradients_are_those_of_the_torch_operations_in_double_precision(
    improvements, num_reads, num_rows, scale, start
):
    sizes = DNCSizes(num_reads, 5, improvements)
    before = start(sizes, num_rows, batch=3)

    outputs, gradients = values_and_gradients(kernel.compiled_access, sizes, before, scale, torch.float32)
    expected, expected_gradients = values_and_gradients(
        access.access_memory, sizes, before, scale, torch.float64
    )

    for name, ours, theirs in zip(Accessed._fields, outputs, expected, strict=True):
        assert_close(
            ours.double(), theirs, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, ours, theirs in zip(
        ("requested", *Accessed._fields), gradients, expected_gradients, strict=False
    ):
        for row, expected_row in zip(ours.double(), theirs, strict=True):
            most = float(expected_row.abs().max())
            assert_close(
                row, expected_row, atol=1e-4 * most, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("improvements", EACH)
@pytest.mark.parametrize("start", [empty, in_use])
def test_gradients_of_all_that_goes_in_are_those_of_small_changes(improvements, start):
    sizes = DNCSizes(2, 2, improvements)
    before = start(sizes, 4)
    requested = torch.randn(1, sizes.num_requested, generator=torch.Generator().manual_seed(2)).double()
    inputs = [requested, *before[:-1]]
    if start is empty:
        # A row of zeros has no direction and attention of 0 no logarithm, so at 0 itself there is no derivative.
        inputs[1:] = [torch.full_like(part, 0.003) for part in inputs[1:]]

    def run(requested, *contents):
        return tuple(kernel.compiled_access(requested, Accessed(*contents, before.read_vectors), sizes))

    assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_a_whole_sequence_gives_the_same_loss_and_the_same_gradients(controller):
    torch.manual_seed(0)
    cell = DNCCell(input_size=9, output_size=8, memory_rows=12, num_read_heads=2, controller=controller)
    inputs = torch.randn(12, 4, 9)

    gradients = []
    for is_compiled in (False, True):
        cell.zero_grad()
        outputs, _ = unroll(cell, inputs, is_compiled=is_compiled)
        outputs.square().mean().backward()
        gradients.append([outputs.detach(), *(weight.grad.clone() for weight in cell.parameters())])

    for theirs, ours in zip(*gradients, strict=True):
        assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_a_number_that_is_not_finite_is_passed_on_and_not_hidden():
    sizes = DNCSizes(1, 4, EACH[-1])
    requested = torch.zeros(1, sizes.num_requested)
    requested[0, 0] = float("nan")
    before = in_use(sizes, 8, dtype=torch.float32)

    after = kernel.compiled_access(requested, before, sizes)

    assert after.read_weightings.isnan().all()
    assert after.write_weightings.isfinite().all()
