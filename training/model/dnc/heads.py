"""Heads: turn the controller's output into what the write head and the read heads ask for.

One linear map serves all heads. `access.py` acts on the requests.

Shapes: B batch, R read heads, C controller size, M row width, P numbers that the heads ask for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Improvements(NamedTuple):
    """Those of Csordás and Schmidhuber (2019), each by itself; without any it is the machine of Graves et al."""

    masked_lookup: bool = True
    """A lookup by content says which columns count (their section 3.1)."""
    deallocation: bool = True
    """A row that is freed is cleared as well, so that no lookup finds it (section 3.2)."""
    sharp_links: bool = True
    """A read head can sharpen where the links lead, so that a long walk does not blur (section 3.3)."""


class DNCSizes(NamedTuple):
    """How many read heads there are beside the write head, of what size, and of what kind."""

    num_read_heads: int
    """R."""
    row_width: int
    """M."""
    improvements: Improvements

    @property
    def read_sizes(self) -> list[int]:
        """What a read head asks for: key, mask, strength, sharpness of both directions, modes, free gate."""
        return [*self._lookup_sizes, 2 * self.improvements.sharp_links, 3, 1]

    @property
    def write_sizes(self) -> list[int]:
        """What the write head asks for: key, mask, strength, what to erase and to add, allocation and write gate."""
        return [*self._lookup_sizes, self.row_width, self.row_width, 1, 1]

    @property
    def num_requested(self) -> int:
        """P: what each read head asks for, then what the write head does."""
        return self.num_read_heads * sum(self.read_sizes) + sum(self.write_sizes)

    @property
    def _lookup_sizes(self) -> list[int]:
        return [self.row_width, self.row_width * self.improvements.masked_lookup, 1]


class LookupRequest(NamedTuple):
    """What to look for in the memory; H heads."""

    key: Tensor
    """k [B, H, M]."""
    mask: Tensor | None
    """m [B, H, M], in (0, 1), how much each column counts; None where all do."""
    strength: Tensor
    """β [B, H, 1], >= 1."""


class ReadRequest(NamedTuple):
    """What each read head asks for."""

    lookup: LookupRequest
    sharpness: Tensor | None
    """s [B, R, 2], >= 1, backward and forward; None where links are not sharpened."""
    modes: Tensor
    """π [B, R, 3], each row summing to 1: backward along the links, by content, forward."""
    free: Tensor
    """f [B, R, 1], in (0, 1): 1 frees what the head read at the last step."""


class WriteRequest(NamedTuple):
    """What the write head asks for."""

    lookup: LookupRequest
    erase: Tensor
    """e [B, 1, M], in (0, 1)."""
    add: Tensor
    """v [B, 1, M]."""
    allocation: Tensor
    """g^a [B, 1, 1], in (0, 1), what share is written to unused rows."""
    update: Tensor
    """1 - g^a [B, 1, 1], what share to those looked up. Computed by itself: the difference is lost in rounding where
    g^a is near 1, and a look-up tells rows apart by their direction where hardly anything is written, too."""
    gate: Tensor
    """g^w [B, 1, 1], in (0, 1): 0 writes nothing."""


class DNCHeads(nn.Linear):
    """The learned map from the controller's output [B, C] to all numbers that the heads ask for [B, P]."""

    def __init__(self, controller_size: int, sizes: DNCSizes) -> None:
        super().__init__(controller_size, sizes.num_requested)
        self.sizes = sizes
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def added(self, requested: Tensor) -> Tensor:
        """[B, P] to what is written, [B, M]."""
        return split(requested, self.sizes)[1].add[:, 0]

    def gates(self, requested: Tensor) -> dict[str, Tensor]:
        """[B, P] to every gate and mode by name, [B] each, in (0, 1)."""
        reading, writing = split(requested, self.sizes)
        named = {"write": writing.gate[:, 0, 0], "allocate": writing.allocation[:, 0, 0]}
        for r in range(self.sizes.num_read_heads):
            which = f" {r + 1}" if self.sizes.num_read_heads > 1 else ""
            named[f"free{which}"] = reading.free[:, r, 0]
            modes = zip(("backward", "content", "forward"), reading.modes[:, r].unbind(-1), strict=True)
            named |= {f"{mode}{which}": share for mode, share in modes}
        return named


def split(requested: Tensor, sizes: DNCSizes) -> tuple[ReadRequest, WriteRequest]:
    """Requests of all heads, each quantity in its range.

    Args:
        requested: [B, P].
        sizes: of the heads.
    """
    num_write = sum(sizes.write_sizes)
    reading, writing = torch.split(requested, [sizes.num_requested - num_write, num_write], dim=-1)
    by_head = reading.reshape(-1, sizes.num_read_heads, sum(sizes.read_sizes))
    key, mask, strength, sharpness, modes, free = torch.split(by_head, sizes.read_sizes, dim=-1)
    read = ReadRequest(
        _lookup(key, mask, strength, sizes),
        _oneplus(sharpness) if sizes.improvements.sharp_links else None,
        torch.softmax(modes, dim=-1),
        torch.sigmoid(free),
    )
    key, mask, strength, erase, add, allocation, gate = torch.split(
        writing.unsqueeze(1), sizes.write_sizes, dim=-1
    )
    # ONNX Runtime's Sigmoid is no more exact near 0 than near 1; its Softmax is.
    shares = torch.softmax(torch.cat([allocation, torch.zeros_like(allocation)], dim=-1), dim=-1)
    write = WriteRequest(
        _lookup(key, mask, strength, sizes),
        torch.sigmoid(erase),
        add,
        shares[..., :1],
        shares[..., 1:],
        torch.sigmoid(gate),
    )
    return read, write


def _lookup(key: Tensor, mask: Tensor, strength: Tensor, sizes: DNCSizes) -> LookupRequest:
    is_masked = sizes.improvements.masked_lookup
    return LookupRequest(key, torch.sigmoid(mask) if is_masked else None, _oneplus(strength))


def _oneplus(x: Tensor) -> Tensor:
    """1 + log(1 + exp(x)), > 1."""
    # ONNX Runtime's Softplus rounds an element differently in the vector part of a tensor and in its remainder.
    return 1 + torch.logsumexp(torch.stack([x, torch.zeros_like(x)], dim=-1), dim=-1)
