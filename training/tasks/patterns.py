"""Patterns: vectors such as random bits hardly ever are, by which a model is tried as well.

Random vectors differ from one another and from a pause, so they hide what a machine does with those that do not: one
that looks rows up finds several alike, and one that waits for silence hears it too soon.

Shapes: V vectors, B batch, K bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.tasks.task import Pattern, random_bits

_PERIODS = (2, 5)


def patterned_bits(
    pattern: Pattern, num_vectors: int, batch_size: int, num_bits: int, *, generator: torch.Generator
) -> Tensor:
    """[V, B, K] vectors of a pattern, each sequence's drawn by itself where there is something to draw."""
    if pattern == "zeros":
        return torch.zeros(num_vectors, batch_size, num_bits)
    if pattern == "equal":
        return random_bits(1, batch_size, num_bits, generator=generator).repeat(num_vectors, 1, 1)
    if pattern == "one-bit":
        bits = torch.zeros(batch_size, num_vectors * num_bits)
        where = torch.randint(num_vectors * num_bits, (batch_size, 1), generator=generator)
        return (
            bits.scatter(1, where, 1.0).view(batch_size, num_vectors, num_bits).transpose(0, 1).contiguous()
        )
    shortest, longest = _PERIODS
    period = torch.randint(shortest, longest + 1, (batch_size,), generator=generator)
    vectors = random_bits(longest, batch_size, num_bits, generator=generator)
    turn = torch.arange(num_vectors).unsqueeze(1) % period
    return vectors.gather(0, turn.unsqueeze(-1).expand(-1, -1, num_bits))
