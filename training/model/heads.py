"""Heads: turn the controller's output into what each head asks for.

One linear map serves all heads, so that a step makes few and large matrix products. `addressing.py` and
`memory.py` act on the requests.

Shapes: B batch, H heads (the read heads, then the write heads), W write heads, C controller size, M row
width, S shift positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.model.addressing import AddressRequest


class WriteRequest(NamedTuple):
    """What each write head does to the rows it attends to."""

    erase: Tensor
    """e [B, M, W], in (0, 1), a column for each head."""
    add: Tensor
    """a [B, M, W]."""


class Heads(nn.Module):
    """The learned map from the controller's output to requests."""

    def __init__(
        self,
        controller_size: int,
        num_read_heads: int,
        num_write_heads: int,
        row_width: int,
        shift_reach: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_read_heads + num_write_heads
        self.num_write_heads = num_write_heads
        self.row_width = row_width
        self._address_sizes = [row_width, 2 * shift_reach + 1, 2, 1]
        self._num_address = self.num_heads * sum(self._address_sizes)
        self._num_write = num_write_heads * row_width
        self.linear = nn.Linear(controller_size, self._num_address + 2 * self._num_write)
        # Large weights, as in pytorch-ntm: heads that differ from step to step from the first sequence on.
        nn.init.xavier_uniform_(self.linear.weight, gain=1.4)
        nn.init.normal_(self.linear.bias, std=0.01)

    def forward(self, controlled: Tensor) -> tuple[AddressRequest, WriteRequest]:
        """Requests of all heads.

        Args:
            controlled: [B, C], the controller's output.
        """
        address, erase, add = torch.split(
            self.linear(controlled), [self._num_address, self._num_write, self._num_write], dim=-1
        )
        by_head = address.reshape(-1, self.num_heads, sum(self._address_sizes))
        key, kernel, positive, gate = torch.split(by_head, self._address_sizes, dim=-1)
        strength, sharpness = torch.split(softplus(positive), 1, dim=-1)
        by_column = (-1, self.row_width, self.num_write_heads)
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


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), >= 0.

    Written as log(exp(0) + exp(x)) because ONNX Runtime's Softplus rounds an element differently by where in
    the batch it stands (its vector and its scalar code differ in the last bit); this goes row by row.

    Args:
        x: any shape.

    Returns:
        the shape of `x`.
    """
    zero_and_x = x.unsqueeze(-1) @ torch.tensor([[0.0, 1.0]], dtype=x.dtype, device=x.device)
    return torch.logsumexp(zero_and_x, dim=-1)
