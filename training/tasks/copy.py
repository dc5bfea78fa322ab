"""Copy: hear a sequence of random bit vectors, then say it again (section 4.1).

The layout of a sequence, which client and server share: T steps with the vectors on the first channels, one
step with only the last channel set, the delimiter, then T steps of zeros during which the vectors are due.

Shapes: T length of the sequence to copy, B batch, K bits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.tasks.patterns import patterned_bits
from training.tasks.task import Pattern, Sequences, Size, Task, in_order, random_bits


class CopyTask(Task):
    """Settings of the copy task, and its sequences."""

    size_names: ClassVar = ("length",)

    name: Literal["copy"] = "copy"
    """The task."""
    num_bits: int = Field(default=8, ge=1, le=10_000)
    """Bits in a vector."""
    min_length: int = Field(default=1, ge=1, le=100_000)
    """Vectors in the shortest training sequence."""
    max_length: int = Field(default=20, ge=1, le=100_000)
    """Vectors in the longest training sequence."""
    blank_share: float = Field(default=0.0, ge=0, lt=1)
    """In training alone, half of the vectors are blank in this share of the sequences. By chance two blank vectors of 8
    bits stand in a row once in 65,536: too seldom to learn from that they are not yet the pause in which the copy is
    due."""

    @model_validator(mode="after")
    def _lengths_are_in_order(self) -> CopyTask:
        in_order("min_length", self.min_length, "max_length", self.max_length)
        return self

    @property
    def input_size(self) -> int:
        """The bits and the delimiter."""
        return self.num_bits + 1

    @property
    def output_size(self) -> int:
        """The bits."""
        return self.num_bits

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits, then the delimiter; zeros while the copy is read"

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits in (0, 1), to be read at 0.5 once the delimiter was sent"

    def sizes(self) -> list[Size]:
        """Every length of training."""
        return [(length,) for length in range(self.min_length, self.max_length + 1)]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences of T vectors: inputs [2T + 1, B, K + 1], targets [T, B, K]."""
        (length,) = size
        return self._laid_out(random_bits(length, batch_size, self.num_bits, generator=generator))

    def draw_for_training(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """As `draw`, with more blank vectors: see `blank_share`."""
        sequences = self.draw(batch_size, size, generator)
        if self.blank_share:
            (length,) = size
            with_blanks = torch.rand(batch_size, 1, generator=generator) < self.blank_share
            stays = ~(with_blanks & (torch.rand(length, batch_size, 1, generator=generator) < 0.5))
            sequences.inputs[:length, :, : self.num_bits] *= stays
            sequences.targets.mul_(stays)
        return sequences

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences:
        """As `draw`, the vectors of a pattern."""
        (length,) = size
        return self._laid_out(patterned_bits(pattern, length, batch_size, self.num_bits, generator=generator))

    def _laid_out(self, vectors: Tensor) -> Sequences:
        length, batch_size, _ = vectors.shape
        inputs = torch.zeros(2 * length + 1, batch_size, self.input_size)
        inputs[:length, :, : self.num_bits] = vectors
        inputs[length, :, self.num_bits] = 1
        return Sequences(inputs, vectors)
