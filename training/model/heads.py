"""Heads: turn the controller's output into what each head asks for.

One linear map serves all heads, so that a step makes few and large matrix products. `addressing.py` and
`memory.py` act on the requests.

Shapes: B batch, H heads (the read heads, then the write heads), W write heads, C controller size, M row
width, S shift positions, P numbers that the heads ask for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.addressing import AddressRequest


class WriteRequest(NamedTuple):
    """What each write head does to the rows it attends to."""

    erase: Tensor
    """e [B, M, W], in (0, 1), a column for each head."""
    add: Tensor
    """a [B, M, W]."""


class HeadSizes(NamedTuple):
    """How many heads there are, and of what size."""

    num_read_heads: int
    num_write_heads: int
    row_width: int
    """M."""
    shift_reach: int
    """How far a head can move its attention in one step, in rows."""

    @property
    def num_heads(self) -> int:
        """H, the read heads and the write heads."""
        return self.num_read_heads + self.num_write_heads

    @property
    def num_shifts(self) -> int:
        """S."""
        return 2 * self.shift_reach + 1

    @property
    def address_sizes(self) -> list[int]:
        """What a head needs to address: key, kernel, strength and sharpness, gate."""
        return [self.row_width, self.num_shifts, 2, 1]

    @property
    def num_requested(self) -> int:
        """P: what all heads need to address, then what the write heads erase, then what they add."""
        return self.num_heads * sum(self.address_sizes) + 2 * self.num_write_heads * self.row_width


class HeadRows(NamedTuple):
    """Which of the P numbers are which quantity: indices."""

    key: Tensor
    """[H, M]."""
    kernel: Tensor
    """[H, S]."""
    strength: Tensor
    """[H, 1]."""
    sharpness: Tensor
    """[H, 1]."""
    gate: Tensor
    """[H, 1]."""
    erase: Tensor
    """[M, W]."""
    add: Tensor
    """[M, W]."""


def rows_of(sizes: HeadSizes) -> HeadRows:
    """Where the linear map of heads has what, for those who put it into another order; `split` is the usual way."""
    num_write = sizes.num_write_heads * sizes.row_width
    address, erase, add = torch.split(
        torch.arange(sizes.num_requested), [sizes.num_requested - 2 * num_write, num_write, num_write]
    )
    by_column = (sizes.row_width, sizes.num_write_heads)
    key, kernel, strength, sharpness, gate = torch.split(
        address.reshape(sizes.num_heads, -1), [sizes.row_width, sizes.num_shifts, 1, 1, 1], dim=1
    )
    return HeadRows(key, kernel, strength, sharpness, gate, erase.reshape(by_column), add.reshape(by_column))


class Heads(nn.Linear):
    """The learned map from the controller's output [B, C] to all numbers that the heads ask for [B, P]."""

    def __init__(self, controller_size: int, sizes: HeadSizes) -> None:
        super().__init__(controller_size, sizes.num_requested)
        self.sizes = sizes
        # Large weights, as in pytorch-ntm: heads that differ from step to step from the first sequence on.
        nn.init.xavier_uniform_(self.weight, gain=1.4)
        nn.init.normal_(self.bias, std=0.01)

    def added(self, requested: Tensor) -> Tensor:
        """[B, P] to what the write heads add together, [B, M]."""
        return split(requested, self.sizes)[1].add.sum(dim=-1)


def split(requested: Tensor, sizes: HeadSizes) -> tuple[AddressRequest, WriteRequest]:
    """Requests of all heads, each quantity in its range.

    Args:
        requested: [B, P].
        sizes: of the heads.
    """
    num_write = sizes.num_write_heads * sizes.row_width
    address, erase, add = torch.split(
        requested, [sizes.num_requested - 2 * num_write, num_write, num_write], dim=-1
    )
    by_head = address.reshape(-1, sizes.num_heads, sum(sizes.address_sizes))
    key, kernel, positive, gate = torch.split(by_head, sizes.address_sizes, dim=-1)
    strength, sharpness = torch.split(F.softplus(positive), 1, dim=-1)
    by_column = (-1, sizes.row_width, sizes.num_write_heads)
    return (
        AddressRequest(
            key=key,
            strength=strength,
            gate=torch.sigmoid(gate),
            kernel=torch.softmax(kernel, dim=-1),
            sharpness=1 + sharpness,
        ),
        WriteRequest(erase=torch.sigmoid(erase).reshape(by_column), add=add.reshape(by_column)),
    )
