"""Memory: read it and write it by attention (sections 3.1 and 3.2).

Pure functions of tensors. `addressing.py` makes the weightings, `heads.py` what is erased and added.

Memory is kept with its rows in the last axis, as [B, M, N]: `addressing.py` says why.

Shapes: B batch, R read heads, W write heads, N memory rows, M row width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read(memory: Tensor, weightings: Tensor) -> Tensor:
    """What each head reads: the mean of the memory rows, weighted by its attention (eq. 2).

    Args:
        memory: [B, M, N].
        weightings: [B, R, N], each row summing to 1.

    Returns:
        [B, R, M].
    """
    return weightings @ memory.transpose(1, 2)


def write(memory: Tensor, weightings: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Erase, then add (eq. 3 and 4).

    What the heads erase is multiplied and what they add is summed, so their order does not matter. A head
    that attends to one row alone and erases all of it leaves exactly what it adds.

    Args:
        memory: [B, M, N].
        weightings: [B, W, N], each row summing to 1.
        erase: [B, M, W], in [0, 1].
        add: [B, M, W].

    Returns:
        [B, M, N].
    """
    kept = memory
    for erased, attention in zip(each_head(erase, 2), each_head(weightings, 1), strict=True):
        kept = kept - (erased @ attention) * kept
    return kept + add @ weightings


def each_head(tensor: Tensor, axis: int) -> Sequence[Tensor]:
    """Each head's part; one head's is the whole, without an operation."""
    return [tensor] if tensor.shape[axis] == 1 else torch.split(tensor, 1, dim=axis)
