"""Copy episode: one copy after another in one sequence, so that a memory must be freed and used again.

The layout of a sequence, C times over: L steps with random bit vectors on the first channels, one step with only the
last channel set, the delimiter, then L steps of zeros during which the vectors are due. A memory with fewer than L C
rows cannot hold the vectors of all copies.

Shapes: L length of a copy, C copies, B batch, K bits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.tasks.patterns import patterned_bits
from training.tasks.task import Pattern, Sequences, Size, Task, in_order, random_bits


class CopyEpisodeTask(Task):
    """Settings of the copy episode task, and its sequences."""

    size_names: ClassVar = ("length", "copies")

    name: Literal["copy-episode"] = "copy-episode"
    """The task."""
    num_bits: int = Field(default=8, ge=1)
    """Bits in a vector."""
    min_length: int = Field(default=1, ge=1)
    """Vectors in the shortest copy of training."""
    max_length: int = Field(default=5, ge=1)
    """Vectors in the longest copy of training."""
    min_copies: int = Field(default=1, ge=1)
    """Fewest copies in a training sequence."""
    max_copies: int = Field(default=6, ge=1)
    """Most copies in a training sequence."""

    sparse_share: float = Field(default=0.0, ge=0, le=1)
    """In training alone, this share of the sequences has few ones, or none: random bits hide what a machine does with
    vectors that are alike, or like a pause."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> CopyEpisodeTask:
        in_order("min_length", self.min_length, "max_length", self.max_length)
        in_order("min_copies", self.min_copies, "max_copies", self.max_copies)
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
        return f"{self.num_bits} bits, then the delimiter; zeros while a copy is read, after which another may begin"

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits in (0, 1), to be read at 0.5 once a delimiter was sent, until the copy ends"

    def sizes(self) -> list[Size]:
        """Every length with every number of copies."""
        return [
            (length, copies)
            for length in range(self.min_length, self.max_length + 1)
            for copies in range(self.min_copies, self.max_copies + 1)
        ]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences: inputs [C (2L + 1), B, K + 1], targets [C (2L + 1), B, K], masked but for the copies."""
        length, copies = size
        vectors = random_bits(length * copies, batch_size, self.num_bits, generator=generator)
        return self._laid_out(vectors, copies)

    def draw_for_training(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """As `draw`, with sequences of few ones: see `sparse_share`."""
        if not self.sparse_share:
            return self.draw(batch_size, size, generator)
        length, copies = size
        vectors = random_bits(length * copies, batch_size, self.num_bits, generator=generator)
        is_sparse = torch.rand(batch_size, 1, generator=generator) < self.sparse_share
        kept = torch.where(is_sparse, torch.rand(batch_size, 1, generator=generator), 1.0)
        return self._laid_out(vectors * (torch.rand(vectors.shape, generator=generator) < kept), copies)

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences:
        """As `draw`, the vectors of a pattern."""
        length, copies = size
        vectors = patterned_bits(pattern, length * copies, batch_size, self.num_bits, generator=generator)
        return self._laid_out(vectors, copies)

    def _laid_out(self, vectors: Tensor, copies: int) -> Sequences:
        parts = vectors.view(copies, -1, *vectors.shape[1:])
        length, batch_size = parts.shape[1:3]
        inputs = torch.zeros(copies, 2 * length + 1, batch_size, self.input_size)
        inputs[:, :length, :, : self.num_bits] = parts
        inputs[:, length, :, self.num_bits] = 1
        targets = torch.zeros(copies, 2 * length + 1, batch_size, self.output_size)
        targets[:, length + 1 :] = parts
        mask = torch.zeros(copies, 2 * length + 1, batch_size, dtype=torch.bool)
        mask[:, length + 1 :] = True
        return Sequences(inputs.flatten(0, 1), targets.flatten(0, 1), mask.flatten(0, 1))
