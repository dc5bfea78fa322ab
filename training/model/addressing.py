"""Addressing: turn what a head asks for into attention over the memory rows (section 3.3).

Pure functions of tensors, so they trace, export and test without a model. `heads.py` makes the requests and
`memory.py` spends the weightings.

The formulas are written for ONNX Runtime, which runs one step at a time: few operations, and few of them on
something as large as the memory, whose rows stand in its last axis because broadcasts along it are the cheap ones.
A row of a batch gets the same bits whatever else is in the batch, so sums over the memory are matrix products;
`export` verifies that. `benchmarks/step_graph.py` measures it all against the paper's formulas taken literally.

Shapes: B batch, H heads, N memory rows, M row width, S shift positions (odd).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A row of zeros has no direction. Its squared norm counts as at least this, so that its similarity is 0 and its
# gradient finite. These floors are maxima and not sums because the ONNX exporter's optimiser takes a sum with so
# small a number for a sum with 0 and drops it.
LEAST_SQUARED_NORM = 1e-8
# The square of a row longer than 1e19 is infinite in float32. Its squared norm counts as at most this, 2^126, so that
# PyTorch, the kernel and ONNX Runtime agree on it, whichever way they sum.
GREATEST_SQUARED_NORM = 2.0**126
# A key of zeros has no direction either. The norm of a key counts as no less and no more than these.
LEAST_KEY_NORM, GREATEST_KEY_NORM = 1e-12, 2.0**63
# Attention of 0 has no logarithm. As far as sharpening is concerned this is the least there is.
LEAST_ATTENTION = 1e-16


class AddressRequest(NamedTuple):
    """What each head asks for at one step: the five quantities of figure 2."""

    key: Tensor
    """k [B, H, M], what to look for."""
    strength: Tensor
    """β [B, H, 1], >= 0, how sharply to look."""
    gate: Tensor
    """g [B, H, 1], in (0, 1): 1 looks anew, 0 stays with the last weighting."""
    kernel: Tensor
    """s [B, H, S], each row summing to 1; entry i moves attention by S // 2 - i rows."""
    sharpness: Tensor
    """γ [B, H, 1], >= 1, undoes the blur that the shift leaves."""


def address(request: AddressRequest, memory: Tensor, previous: Tensor) -> Tensor:
    """The whole of figure 2: look by content, decide whether to, shift, sharpen.

    Args:
        request: what each head asks for.
        memory: [B, M, N].
        previous: [B, H, N], the heads' weightings of the last step, each row summing to 1.

    Returns:
        [B, H, N], each row in [0, 1] and summing to 1.
    """
    by_content = focus_by_content(request.key, request.strength, memory)
    gated = interpolate(by_content, previous, request.gate)
    return sharpen(shift(gated, request.kernel.unsqueeze(-2)), request.sharpness)


def focus_by_content(key: Tensor, strength: Tensor, memory: Tensor) -> Tensor:
    """Attention by content (eq. 5): rows more like the key get more, the more so the greater the strength.

    Likeness is the cosine of the angle between key and row (eq. 6), 0 for a row or key of zeros. A row shorter
    than 1e-4 counts as less similar than it is: its norm is taken for 1e-4; that of a key shorter than 1e-12 for
    1e-12, that of a row or key longer than 2^63 for 2^63.

    Args:
        key: k [B, H, M].
        strength: β [B, H, 1], >= 0.
        memory: [B, M, N].

    Returns:
        [B, H, N], each row summing to 1.
    """
    # The strength and the row norms go to what is small: the key and the scores, not the memory.
    return torch.softmax(((strength * unit(key)) @ memory) / _row_norms(memory), dim=-1)


def unit(key: Tensor) -> Tensor:
    """[..., M] to the same direction at length 1, but for keys beyond the bounds above."""
    norm: Tensor = torch.linalg.vector_norm(key, dim=-1, keepdim=True)
    return key / norm.clamp(LEAST_KEY_NORM, GREATEST_KEY_NORM)


def _row_norms(memory: Tensor) -> Tensor:
    """[B, M, N] to [B, 1, N]."""
    ones = torch.ones(1, memory.shape[1], dtype=memory.dtype, device=memory.device)
    return (ones @ (memory * memory)).clamp(LEAST_SQUARED_NORM, GREATEST_SQUARED_NORM).sqrt()


def interpolate(by_content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """Mix the attention by content with that of the last step (eq. 7).

    Args:
        by_content: [B, H, N], each row summing to 1.
        previous: [B, H, N], each row summing to 1.
        gate: g [B, H, 1], in [0, 1]; 1 takes the content alone.

    Returns:
        [B, H, N], each row summing to 1.
    """
    return previous + gate * (by_content - previous)


def shift(weightings: Tensor, kernel: Tensor) -> Tensor:
    """Rotate each head's attention by a distribution over small steps (eq. 8), wrapping round at the ends.

    Args:
        weightings: [B, H, N], each row summing to 1.
        kernel: s [B, H, 1, S], a row for a product, S <= N, each summing to 1; the first entry moves attention
            S // 2 rows forward, the middle one means "stay".

    Returns:
        [B, H, N], each row summing to 1.
    """
    num_rows, num_positions = weightings.shape[-1], kernel.shape[-1]
    reach = num_positions // 2
    if reach == 0:
        return weightings
    # The ring unrolled, in lines one longer than the ring: each begins one row further on than the line above it,
    # so that line i is the ring moved forward by reach - i. The last column is one too many.
    turns = [weightings[..., -reach:], *[weightings] * num_positions, weightings[..., : reach + 1]]
    lines = torch.cat(turns, dim=-1).reshape(*weightings.shape[:-1], num_positions, num_rows + 1)
    return (kernel @ lines).squeeze(-2)[..., :num_rows]


def sharpen(weightings: Tensor, sharpness: Tensor) -> Tensor:
    """Raise attention to a power and normalise it (eq. 9).

    Computed as a softmax of γ log w, which is the same and never divides 0 by 0.

    Args:
        weightings: [B, H, N], each row in [0, 1] and summing to 1.
        sharpness: γ [B, H, 1], >= 1.

    Returns:
        [B, H, N], each row summing to 1.
    """
    return torch.softmax(sharpness * weightings.clamp_min(LEAST_ATTENTION).log(), dim=-1)
