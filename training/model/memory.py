"""Memory: read it and write it by attention (sections 3.1 and 3.2).

Pure functions of tensors. `addressing.py` makes the weightings, `heads.py` what is erased and added.

Shapes: B batch, R read heads, W write heads, N memory rows, M row width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read(memory: Tensor, weightings: Tensor) -> Tensor:
    """What each head reads: the mean of the memory rows, weighted by its attention (eq. 2).

    Args:
        memory: [B, N, M].
        weightings: [B, R, N], each row summing to 1.

    Returns:
        [B, R, M].
    """
    return weightings @ memory


def write(memory: Tensor, weightings: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Erase, then add (eq. 3 and 4).

    What the heads erase is multiplied and what they add is summed, so their order does not matter. A head
    that attends to one row alone and erases all of it leaves exactly what it adds.

    Args:
        memory: [B, N, M].
        weightings: [B, W, N], each row summing to 1.
        erase: [B, W, M], in [0, 1].
        add: [B, W, M].

    Returns:
        [B, N, M].
    """
    for head in range(weightings.shape[1]):
        erased = weightings[:, head, :, None] * erase[:, head, None, :]
        memory = torch.addcmul(memory, memory, erased, value=-1)
    return torch.baddbmm(memory, weightings.transpose(1, 2), add)
