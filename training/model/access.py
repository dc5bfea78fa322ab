"""Access: from what the heads ask for, all in one row of numbers, to the memory written and read.

The meeting point of `heads.py`, `addressing.py` and `memory.py`, in torch operations, which torch differentiates on
a GPU. `kernel.py` is the same as one compiled operation for training on a CPU, `export/access.py` the same for ONNX
Runtime.

Shapes: B batch, H heads (R read heads, then W write heads), N memory rows, M row width, P numbers that the heads
ask for: `HeadSizes.num_requested`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.model import memory as memory_access
from training.model.addressing import address
from training.model.heads import HeadSizes, split


class Accessed(NamedTuple):
    """What a step leaves in and takes from the memory."""

    weightings: Tensor
    """[B, H, N], each row in [0, 1] and summing to 1."""
    memory: Tensor
    """[B, M, N]."""
    read_vectors: Tensor
    """[B, R, M]."""


def access_memory(requested: Tensor, memory: Tensor, previous: Tensor, sizes: HeadSizes) -> Accessed:
    """All heads address the memory as it is, then the write heads write, then the read heads read.

    Args:
        requested: [B, P], see `heads.split`.
        memory: [B, M, N].
        previous: [B, H, N], the heads' weightings of the last step, each row summing to 1.
        sizes: how many heads of what size.
    """
    request, to_write = split(requested, sizes)
    weightings = address(request, memory, previous)
    reading, writing = torch.split(weightings, [sizes.num_read_heads, sizes.num_write_heads], dim=1)
    written = memory_access.write(memory, writing, to_write.erase, to_write.add)
    return Accessed(weightings, written, memory_access.read(written, reading))
