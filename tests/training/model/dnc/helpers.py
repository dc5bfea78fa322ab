"""Builders shared by the tests of the DNC."""

from __future__ import annotations

import itertools

import torch

from training.model.dnc.access import Accessed, access_memory
from training.model.dnc.heads import DNCSizes, Improvements

EACH = [Improvements(*switches) for switches in itertools.product([False, True], repeat=3)]


def empty(sizes: DNCSizes, num_rows: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Accessed:
    shapes = Accessed(
        memory=(sizes.row_width, num_rows),
        usage=(num_rows,),
        write_weightings=(1, num_rows),
        precedence=(num_rows,),
        links=(num_rows, num_rows),
        read_weightings=(sizes.num_read_heads, num_rows),
        read_vectors=(sizes.num_read_heads, sizes.row_width),
    )
    return Accessed(*(torch.zeros(batch, *shape, dtype=dtype) for shape in shapes))


def in_use(sizes: DNCSizes, num_rows: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Accessed:
    """A state after some steps of random requests."""
    generator = torch.Generator().manual_seed(1)
    state = empty(sizes, num_rows, batch, torch.float64)
    for _ in range(6):
        requested = 2 * torch.randn(batch, sizes.num_requested, generator=generator, dtype=torch.float64)
        state = access_memory(requested, state, sizes)
    return Accessed(*(tensor.to(dtype) for tensor in state))
