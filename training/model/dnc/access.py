"""Access: from what the heads ask for to the memory written and read, with usage and links brought up to date.

In torch operations, which torch differentiates on a GPU, and few of which are as large as the links, so that the
exported step is what is here. `kernel.py` is the same as one compiled operation for training on a CPU. The equations
are those of Graves et al. (2016), in the order of their methods section; a test holds each to a slow reading of it.

Shapes: B batch, H heads of either kind, R read heads, N memory rows, M row width, P numbers that the heads ask for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.model.addressing import (
    GREATEST_SQUARED_NORM,
    LEAST_ATTENTION,
    LEAST_SQUARED_NORM,
    unit,
)
from training.model.dnc.heads import DNCSizes, LookupRequest, split

# A usage of exactly 0 would leave rows behind it in the free list without a gradient.
LEAST_USAGE = 1e-6
# The free list tells so many levels of usage apart; rows of the same level stand in it in the order of the memory. Rows
# with the same past are used alike but for rounding, and which of them is written first must not depend on the last
# bit: machines that round differently, such as the cell and what is exported from it, would do different things.
USAGE_LEVELS = 16.0


class Accessed(NamedTuple):
    """What a step finds in the memory and leaves there."""

    memory: Tensor
    """[B, M, N]."""
    usage: Tensor
    """u [B, N], in [0, 1]: 0 is free."""
    write_weightings: Tensor
    """w^w [B, 1, N], in [0, 1], summing to at most 1."""
    precedence: Tensor
    """p [B, N], in [0, 1], summing to at most 1: how far each row was the last one written."""
    links: Tensor
    """L [B, N, N], in [0, 1]: element i, j says how far row i was written right after row j; zeros where i = j."""
    read_weightings: Tensor
    """w^r [B, R, N], in [0, 1], each summing to at most 1."""
    read_vectors: Tensor
    """[B, R, M]."""


def access_memory(requested: Tensor, before: Accessed, sizes: DNCSizes) -> Accessed:
    """Free what was read, write, link, then read.

    Args:
        requested: [B, P], see `heads.split`.
        before: what the last step left.
        sizes: of the heads.
    """
    reading, writing = split(requested, sizes)
    improvements = sizes.improvements

    retained = retention(reading.free, before.read_weightings)
    usage = used(before.usage, before.write_weightings.squeeze(1), retained)
    allocated = allocation(usage).unsqueeze(1)
    by_content = lookup(writing.lookup, before.memory)
    weightings = writing.gate * (writing.allocation * allocated + writing.update * by_content)
    memory = before.memory
    if improvements.deallocation:
        memory = memory * retained.unsqueeze(1)
    memory = write(memory, weightings, writing.erase, writing.add)

    written = weightings.squeeze(1)
    links = linked(before.links, before.precedence, written)
    precedence = before.precedence + written - _total(written) * before.precedence

    backward = before.read_weightings @ links
    forward = before.read_weightings @ links.mT
    if reading.sharpness is not None:
        backward = sharpen(backward, reading.sharpness[..., :1])
        forward = sharpen(forward, reading.sharpness[..., 1:])
    modes = reading.modes
    read_weightings = (
        modes[..., 0:1] * backward
        + modes[..., 1:2] * lookup(reading.lookup, memory)
        + modes[..., 2:3] * forward
    )
    return Accessed(
        memory, usage, weightings, precedence, links, read_weightings, read_weightings @ memory.mT
    )


def retention(free: Tensor, read_weightings: Tensor) -> Tensor:
    """How much of each row is not freed (ψ).

    Args:
        free: f [B, R, 1], in [0, 1].
        read_weightings: [B, R, N], of the last step.

    Returns:
        [B, N], in [0, 1].
    """
    kept = 1 - free * read_weightings
    first, *others = torch.unbind(kept, dim=1)
    for other in others:
        first = first * other
    return first


def used(usage: Tensor, written: Tensor, retained: Tensor) -> Tensor:
    """How far each row is in use, [B, N] (u): more by what was written at the last step, less by what is freed."""
    return (usage + written - usage * written) * retained


def allocation(usage: Tensor) -> Tensor:
    """Attention over unused rows, the least used first (a): each row gets what those before it leave, if it is free.

    Args:
        usage: u [B, N], in [0, 1].

    Returns:
        [B, N], in [0, 1], summing to at most 1.
    """
    num_rows = usage.shape[-1]
    # Where each row stands in the free list, φ; a product over those before it is a matrix product of logarithms.
    rows = torch.arange(num_rows, device=usage.device)
    places = torch.round(usage.detach() * USAGE_LEVELS) * num_rows + rows
    is_before = (places.unsqueeze(2) < places.unsqueeze(1)).to(usage.dtype)
    usage = LEAST_USAGE + (1 - LEAST_USAGE) * usage
    left = (usage.log().unsqueeze(1) @ is_before).exp().squeeze(1)
    return (1 - usage) * left


def lookup(request: LookupRequest, memory: Tensor) -> Tensor:
    """Attention by content (C, D): rows more like the key get more, the more so the greater the strength.

    Likeness is the cosine of the angle between key and row, both times the mask if there is one. Norms have the same
    bounds as in `addressing.focus_by_content`.

    Args:
        request: of H heads.
        memory: [B, M, N].

    Returns:
        [B, H, N], each row summing to 1.
    """
    key, mask = request.key, request.mask
    if mask is None:
        unit_key = unit(key)
        weights = torch.ones(1, key.shape[-1], dtype=key.dtype, device=key.device)
    else:
        unit_key = unit(key * mask) * mask
        weights = mask * mask
    norms = (weights @ (memory * memory)).clamp(LEAST_SQUARED_NORM, GREATEST_SQUARED_NORM).sqrt()
    return torch.softmax(((request.strength * unit_key) @ memory) / norms, dim=-1)


def write(memory: Tensor, weightings: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Erase and add.

    Args:
        memory: [B, M, N].
        weightings: [B, 1, N].
        erase: e [B, 1, M], in [0, 1].
        add: v [B, 1, M].

    Returns:
        [B, M, N].
    """
    return memory + (add.mT - erase.mT * memory) * weightings


def linked(links: Tensor, precedence: Tensor, written: Tensor) -> Tensor:
    """The links after a write (L): row i follows the row that was last written before it.

    Args:
        links: [B, N, N].
        precedence: p [B, N], before the write.
        written: w^w [B, N].

    Returns:
        [B, N, N].
    """
    num_rows = written.shape[-1]
    follows = 1 - torch.eye(num_rows, dtype=links.dtype, device=links.device)
    to, origin = written.unsqueeze(2), written.unsqueeze(1)
    return ((1 - to - origin) * links + to * precedence.unsqueeze(1)) * follows


def sharpen(weightings: Tensor, sharpness: Tensor) -> Tensor:
    """Raise attention to a power and normalise it (S).

    Args:
        weightings: [B, R, N], each summing to at most 1. Where there are only zeros attention is even.
        sharpness: s [B, R, 1], >= 1.

    Returns:
        [B, R, N], each summing to 1.
    """
    return torch.softmax(sharpness * weightings.clamp_min(LEAST_ATTENTION).log(), dim=-1)


def _total(written: Tensor) -> Tensor:
    """[B, N] to [B, 1]; a matrix product sums in the same order at every batch size."""
    ones = torch.ones(written.shape[-1], 1, dtype=written.dtype, device=written.device)
    return written.unsqueeze(1).matmul(ones).squeeze(1)
