"""Addressing against loops written from the paper's equations, and its invariants."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from training.model.addressing import (
    AddressRequest,
    address,
    focus_by_content,
    interpolate,
    sharpen,
    shift,
)

SHAPES = [(1, 1, 3, 2, 3), (2, 3, 8, 5, 3), (3, 2, 7, 4, 5), (2, 1, 5, 3, 1)]
shapes = pytest.mark.parametrize(("batch", "heads", "rows", "width", "positions"), SHAPES)


def random_weightings(*shape: int) -> Tensor:
    return torch.softmax(3 * torch.randn(*shape), dim=-1)


def one_hot(rows: list[int], num_rows: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([rows]), num_rows).float()


def random_request(batch: int, heads: int, width: int, positions: int, scale: float = 1.0) -> AddressRequest:
    return AddressRequest(
        key=scale * torch.randn(batch, heads, width),
        strength=scale * torch.rand(batch, heads, 1) + 1e-3,
        gate=torch.rand(batch, heads, 1),
        kernel=random_weightings(batch, heads, positions),
        sharpness=1 + scale * torch.rand(batch, heads, 1),
    )


@shapes
def test_focus_by_content_is_the_softmax_of_cosines_of_equations_5_and_6(
    batch, heads, rows, width, positions
):
    torch.manual_seed(0)
    key, memory = torch.randn(batch, heads, width), torch.randn(batch, width, rows)
    strength = 3 * torch.rand(batch, heads, 1)

    result = focus_by_content(key, strength, memory)

    for b in range(batch):
        for h in range(heads):
            powers = []
            for i in range(rows):
                dot = sum(float(key[b, h, m] * memory[b, m, i]) for m in range(width))
                cosine = dot / (math.hypot(*key[b, h].tolist()) * math.hypot(*memory[b, :, i].tolist()))
                powers.append(math.exp(float(strength[b, h, 0]) * cosine))
            assert result[b, h].tolist() == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)


@shapes
def test_interpolate_is_equation_7(batch, heads, rows, width, positions):
    torch.manual_seed(2)
    content, previous = random_weightings(batch, heads, rows), random_weightings(batch, heads, rows)
    gate = torch.rand(batch, heads, 1)

    result = interpolate(content, previous, gate)

    for b in range(batch):
        for h in range(heads):
            g = float(gate[b, h, 0])
            expected = [g * float(content[b, h, i]) + (1 - g) * float(previous[b, h, i]) for i in range(rows)]
            assert result[b, h].tolist() == pytest.approx(expected, abs=1e-6)


@shapes
def test_shift_is_the_circular_convolution_of_equation_8(batch, heads, rows, width, positions):
    torch.manual_seed(3)
    weightings, kernel = random_weightings(batch, heads, rows), random_weightings(batch, heads, positions)

    result = shift(weightings, kernel.unsqueeze(-2))

    reach = positions // 2
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                expected = sum(
                    float(weightings[b, h, (i - move) % rows] * kernel[b, h, reach - move])
                    for move in range(-reach, reach + 1)
                )
                assert float(result[b, h, i]) == pytest.approx(expected, abs=1e-6)


@shapes
def test_sharpen_is_the_normalised_power_of_equation_9(batch, heads, rows, width, positions):
    torch.manual_seed(4)
    weightings, sharpness = random_weightings(batch, heads, rows), 1 + 5 * torch.rand(batch, heads, 1)

    result = sharpen(weightings, sharpness)

    for b in range(batch):
        for h in range(heads):
            powers = [float(weightings[b, h, i]) ** float(sharpness[b, h, 0]) for i in range(rows)]
            assert result[b, h].tolist() == pytest.approx([power / sum(powers) for power in powers], abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*(st.integers(1, 4) for _ in range(2)), st.integers(5, 20), st.integers(1, 6)),
    reach=st.integers(0, 2),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 30.0, 1e4]),
)
def test_weightings_stay_in_0_to_1_and_sum_to_1_whatever_is_asked(seed, shape, reach, scale):
    torch.manual_seed(seed)
    batch, heads, rows, width = shape
    memory, previous = scale * torch.randn(batch, width, rows), random_weightings(batch, heads, rows)

    weightings = address(random_request(batch, heads, width, 2 * reach + 1, scale), memory, previous)

    assert ((weightings >= 0) & (weightings <= 1 + 1e-6)).all()
    assert_close(weightings.sum(-1), torch.ones(batch, heads), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), row=st.integers(0, 9))
def test_a_sharp_key_finds_its_row(seed, row):
    torch.manual_seed(seed)
    memory = torch.linalg.qr(torch.randn(1, 12, 12))[0][..., :10]
    request = AddressRequest(
        key=7 * memory[..., row][:, None],
        strength=torch.full((1, 1, 1), 100.0),
        gate=torch.ones(1, 1, 1),
        kernel=torch.tensor([[[0.0, 1.0, 0.0]]]),
        sharpness=torch.ones(1, 1, 1),
    )

    weightings = address(request, memory, random_weightings(1, 1, 10))

    assert_close(weightings, one_hot([row], 10), atol=1e-5, rtol=0)


def test_a_closed_gate_leaves_attention_where_it_was():
    memory, previous = torch.randn(1, 3, 6), one_hot([4], 6)
    request = random_request(1, 1, 3, 3)._replace(
        gate=torch.zeros(1, 1, 1), kernel=torch.tensor([[[0.0, 1.0, 0.0]]])
    )

    assert_close(address(request, memory, previous), previous)


@pytest.mark.parametrize(
    ("kernel", "start", "end"),
    [([1, 0, 0], 2, 3), ([0, 0, 1], 2, 1), ([0, 1, 0], 2, 2), ([1, 0, 0], 7, 0), ([0, 0, 1], 0, 7)],
)
def test_a_shift_moves_attention_by_one_row_and_wraps_round(kernel, start, end):
    moved = shift(one_hot([start], 8), torch.tensor([[[kernel]]]).float())

    assert_close(moved, one_hot([end], 8))


def test_a_kernel_as_wide_as_the_memory_reaches_every_row():
    moved = shift(one_hot([0], 5), torch.tensor([[[[1.0, 0.0, 0.0, 0.0, 0.0]]]]))

    assert_close(moved, one_hot([2], 5))


@pytest.mark.parametrize("extreme", [1e3, 1e6])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1.0])
def test_zero_memory_zero_keys_and_extreme_requests_give_finite_weightings_and_gradients(size, extreme):
    torch.manual_seed(5)
    key = (size * torch.randn(2, 2, 4)).requires_grad_()
    memory = (size * torch.randn(2, 4, 6)).requires_grad_()
    previous = one_hot([0, 5], 6).repeat(2, 1, 1).requires_grad_()
    strength = torch.full((2, 2, 1), extreme, requires_grad=True)
    sharpness = torch.full((2, 2, 1), extreme, requires_grad=True)
    gate = torch.zeros(2, 2, 1, requires_grad=True)
    kernel = torch.tensor([0.0, 1.0, 0.0]).repeat(2, 2, 1).requires_grad_()

    weightings = address(AddressRequest(key, strength, gate, kernel, sharpness), memory, previous)
    (weightings * torch.arange(6.0)).sum().backward()

    assert weightings.isfinite().all()
    for tensor in (key, memory, previous, strength, sharpness, gate, kernel):
        assert tensor.grad.isfinite().all()
