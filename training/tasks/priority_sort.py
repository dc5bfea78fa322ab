"""Priority sort: hear vectors with a priority each, say those of highest priority, highest first (section 4.5).

The layout of a sequence: a step for each vector, with its bits on the first channels and its priority, even in
[-1, 1], on the last; then a step of zeros for each vector that is due.

Shapes: V vectors heard, S vectors said, B batch, K bits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.tasks.patterns import patterned_bits
from training.tasks.task import Goal, Pattern, Sequences, Size, Task, in_order, random_bits


class PrioritySortTask(Task):
    """Settings of the priority sort task, and its sequences."""

    size_names: ClassVar = ("vectors", "sorted")
    goal: ClassVar = Goal("cost_bits", 10)

    name: Literal["priority-sort"] = "priority-sort"
    """The task."""
    num_bits: int = Field(default=8, ge=1, le=10_000)
    """Bits in a vector."""
    num_vectors: int = Field(default=20, ge=1, le=100_000)
    """Vectors in a sequence."""
    num_sorted: int = Field(default=16, ge=1, le=100_000)
    """How many of them are due."""

    @model_validator(mode="after")
    def _no_more_are_due_than_there_are(self) -> PrioritySortTask:
        in_order("num_sorted", self.num_sorted, "num_vectors", self.num_vectors)
        return self

    @property
    def input_size(self) -> int:
        """The bits and the priority."""
        return self.num_bits + 1

    @property
    def output_size(self) -> int:
        """The bits."""
        return self.num_bits

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits, then the priority in [-1, 1]; zeros while the sorted vectors are read"

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits in (0, 1), to be read at 0.5 once {self.num_vectors} vectors were sent"

    def sizes(self) -> list[Size]:
        """One: how many vectors there are and how many of them are due."""
        return [(self.num_vectors, self.num_sorted)]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences: inputs [V + S, B, K + 1], targets [S, B, K]."""
        num_vectors, num_sorted = size
        vectors = random_bits(num_vectors, batch_size, self.num_bits, generator=generator)
        return self._laid_out(vectors, num_sorted, generator)

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences:
        """As `draw`, the vectors of a pattern."""
        num_vectors, num_sorted = size
        vectors = patterned_bits(pattern, num_vectors, batch_size, self.num_bits, generator=generator)
        return self._laid_out(vectors, num_sorted, generator)

    def _laid_out(self, vectors: Tensor, num_sorted: int, generator: torch.Generator) -> Sequences:
        num_vectors, batch_size, _ = vectors.shape
        priorities = torch.rand(num_vectors, batch_size, generator=generator) * 2 - 1
        inputs = torch.zeros(num_vectors + num_sorted, batch_size, self.input_size)
        inputs[:num_vectors, :, : self.num_bits] = vectors
        inputs[:num_vectors, :, self.num_bits] = priorities
        order = priorities.argsort(dim=0, descending=True)[:num_sorted]
        return Sequences(inputs, vectors.gather(0, order.unsqueeze(-1).expand(-1, -1, self.num_bits)))
