"""What heads ask for stays within what the addressing and the memory expect."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from training.model.heads import Heads, HeadSizes, split


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_requests_have_the_documented_shapes_and_ranges(scale):
    torch.manual_seed(0)
    sizes = HeadSizes(num_read_heads=2, num_write_heads=3, row_width=4, shift_reach=2)
    heads = Heads(5, sizes)

    request, to_write = split(heads(scale * torch.randn(7, 5)), sizes)

    assert request.key.shape == (7, 5, 4)
    assert request.strength.shape == request.gate.shape == request.sharpness.shape == (7, 5, 1)
    assert request.kernel.shape == (7, 5, 5)
    assert to_write.erase.shape == to_write.add.shape == (7, 4, 3)
    assert (request.strength >= 0).all()
    assert (request.sharpness >= 1).all()
    assert ((request.gate >= 0) & (request.gate <= 1)).all()
    assert ((to_write.erase >= 0) & (to_write.erase <= 1)).all()
    assert_close(request.kernel.sum(-1), torch.ones(7, 5))
