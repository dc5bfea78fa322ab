"""Addressing: turn what a head asks for into attention over the memory rows (section 3.3).

Pure functions of tensors, so they trace, export and test without a model. `heads.py` makes the requests and
`memory.py` spends the weightings.

The formulas are written so that ONNX Runtime gives a row of a batch the same bits whatever else is in the
batch: sums over an axis are matrix products, the scores are divided by the norms instead of the memory, and
sharpening is a softmax. `export` verifies it.

Shapes: B batch, H heads, N memory rows, M row width, S shift positions (odd).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A vector of zeros has no direction. A squared norm counts as at least this, so that its similarity is 0 and
# its gradient finite. These floors are maxima and not sums because the ONNX exporter's optimiser takes a sum
# with so small a number for a sum with 0 and drops it.
_LEAST_SQUARED_NORM = 1e-8
# Attention of 0 has no logarithm. As far as sharpening is concerned this is the least there is.
_LEAST_ATTENTION = 1e-16


class AddressRequest(NamedTuple):
    """What each head asks for at one step: the five quantities of figure 2."""

    key: Tensor
    """k [B, H, M], what to look for."""
    strength: Tensor
    """β [B, H, 1], >= 0, how sharply to look."""
    gate: Tensor
    """g [B, H, 1], in (0, 1): 1 looks anew, 0 stays with the last weighting."""
    kernel: Tensor
    """s [B, H, S], each row summing to 1; entry i moves attention by i - S // 2 rows."""
    sharpness: Tensor
    """γ [B, H, 1], >= 1, undoes the blur that the shift leaves."""


def address(request: AddressRequest, memory: Tensor, previous: Tensor) -> Tensor:
    """The whole of figure 2: look by content, decide whether to, shift, sharpen.

    Args:
        request: what each head asks for.
        memory: [B, N, M].
        previous: [B, H, N], the heads' weightings of the last step, each row summing to 1.

    Returns:
        [B, H, N], each row in [0, 1] and summing to 1.
    """
    by_content = focus_by_content(similarity(request.key, memory), request.strength)
    gated = interpolate(by_content, previous, request.gate)
    return sharpen(shift(gated, request.kernel), request.sharpness)


def similarity(key: Tensor, memory: Tensor) -> Tensor:
    """Cosine of the angle between each key and each memory row (eq. 6), 0 for a row or key of zeros.

    One shorter than 1e-4 counts as less similar than it is: its norm is taken for 1e-4.

    Args:
        key: [B, H, M].
        memory: [B, N, M].

    Returns:
        [B, H, N], in [-1, 1].
    """
    ones = torch.ones(memory.shape[-1], 1, dtype=memory.dtype, device=memory.device)
    squared_row_norms = ((memory * memory) @ ones).clamp_min(_LEAST_SQUARED_NORM)  # [B, N, 1]
    squared_key_norms = ((key * key) @ ones).clamp_min(_LEAST_SQUARED_NORM)  # [B, H, 1]
    norms = (squared_key_norms * squared_row_norms.transpose(1, 2)).sqrt()
    return (key @ memory.transpose(1, 2)) / norms


def focus_by_content(similarities: Tensor, strength: Tensor) -> Tensor:
    """Attention by content (eq. 5): rows more like the key get more, the more so the greater the strength.

    Args:
        similarities: [B, H, N].
        strength: β [B, H, 1], > 0.

    Returns:
        [B, H, N], each row summing to 1.
    """
    return torch.softmax(strength * similarities, dim=-1)


def interpolate(by_content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """Mix the attention by content with that of the last step (eq. 7).

    Args:
        by_content: [B, H, N], each row summing to 1.
        previous: [B, H, N], each row summing to 1.
        gate: g [B, H, 1], in [0, 1]; 1 takes the content alone.

    Returns:
        [B, H, N], each row summing to 1.
    """
    return gate * by_content + (1 - gate) * previous


def shift(weightings: Tensor, kernel: Tensor) -> Tensor:
    """Rotate each head's attention by a distribution over small steps (eq. 8), wrapping round at the ends.

    Args:
        weightings: [B, H, N], each row summing to 1.
        kernel: s [B, H, S], S <= N, each row summing to 1; the middle entry means "stay", the last one
            moves attention S // 2 rows forward.

    Returns:
        [B, H, N], each row summing to 1.
    """
    num_rows, num_positions = weightings.shape[-1], kernel.shape[-1]
    reach = num_positions // 2
    if reach == 0:
        return weightings
    # To move attention forward by j, row i takes what row i - j had.
    ring = torch.cat([weightings[..., -reach:], weightings, weightings[..., :reach]], dim=-1)
    moved = [ring[..., 2 * reach - i : 2 * reach - i + num_rows] for i in range(num_positions)]
    return (kernel.unsqueeze(-2) @ torch.stack(moved, dim=-2)).squeeze(-2)


def sharpen(weightings: Tensor, sharpness: Tensor) -> Tensor:
    """Raise attention to a power and normalise it (eq. 9).

    Computed as a softmax of γ log w, which is the same and never divides 0 by 0.

    Args:
        weightings: [B, H, N], each row in [0, 1] and summing to 1.
        sharpness: γ [B, H, 1], >= 1.

    Returns:
        [B, H, N], each row summing to 1.
    """
    return torch.softmax(sharpness * weightings.clamp_min(_LEAST_ATTENTION).log(), dim=-1)
