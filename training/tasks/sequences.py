"""What every task hands to training and evaluation.

Shapes: T steps, B batch, I input size, O output size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sequences(NamedTuple):
    """A batch of sequences of one length, with what the model should answer at the end of each."""

    inputs: Tensor
    """[T, B, I]."""
    targets: Tensor
    """[A, B, O], 0 or 1: the answers of the last A <= T steps; before those the output does not count."""
