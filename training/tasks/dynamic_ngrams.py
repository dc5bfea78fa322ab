"""Dynamic N-grams: predict the next bit of a sequence whose law must be learned on the way (section 4.4).

The law is a table drawn for each sequence: for each of the 2^(N-1) contexts, the last N - 1 bits, the
probability that a 1 follows, from Beta(1/2, 1/2). The first N - 1 bits are even. A step's input is a bit and its
target the next one.

Shapes: L bits in a sequence, B batch, N bits in an N-gram.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.tasks.patterns import patterned_bits
from training.tasks.task import Goal, Pattern, Sequences, Size, Task, random_bits


class DynamicNGramsTask(Task):
    """Settings of the dynamic N-grams task, and its sequences."""

    size_names: ClassVar = ("bits",)
    goal: ClassVar = Goal("cost_over_optimal", 1.02)

    name: Literal["dynamic-ngrams"] = "dynamic-ngrams"
    """The task."""
    order: int = Field(default=6, ge=1, le=16)
    """N: a bit depends on the N - 1 before it."""
    num_bits: int = Field(default=200, ge=2, le=1_000_000)
    """Bits in a sequence."""

    @model_validator(mode="after")
    def _a_context_fits(self) -> DynamicNGramsTask:
        if self.num_bits <= self.order:
            raise ValueError(f"num_bits {self.num_bits} must be greater than order {self.order}")
        return self

    @property
    def input_size(self) -> int:
        """The bit."""
        return 1

    @property
    def output_size(self) -> int:
        """The next bit."""
        return 1

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        return "the bit"

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return "the probability that the next bit is 1"

    def sizes(self) -> list[Size]:
        """One, the number of bits."""
        return [(self.num_bits,)]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences: inputs and targets [L - 1, B, 1]."""
        (num_bits,) = size
        # Beta(1/2, 1/2) is the arcsine law: sin² of an even angle.
        angles = torch.rand(batch_size, 2 ** (self.order - 1), generator=generator) * math.pi / 2
        table = torch.sin(angles).square()
        bits = random_bits(num_bits, batch_size, generator=generator)
        even = torch.rand(num_bits, batch_size, generator=generator)
        context = self._code(bits[: self.order - 1])
        for step in range(self.order - 1, num_bits):
            chance = table.gather(1, context.unsqueeze(1)).squeeze(1)
            bits[step] = (even[step] < chance).float()
            context = self._append(context, bits[step])
        return Sequences(bits[:-1].unsqueeze(-1), bits[1:].unsqueeze(-1))

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences:
        """Sequences whose bits are of a pattern, which the law of none but a very sure table would give."""
        (num_bits,) = size
        bits = patterned_bits(pattern, num_bits, batch_size, 1, generator=generator)
        return Sequences(bits[:-1], bits[1:])

    def optimal_cost(self, sequences: Sequences) -> Tensor:
        """[B], bits paid by (N1 + 1/2) / (N0 + N1 + 1), the counts being those of the context so far (eq. 10)."""
        bits = torch.cat([sequences.inputs[:1], sequences.targets]).squeeze(-1)
        first = self.order - 1
        # The bits before a context is there to count are even; the very first is not predicted.
        cost = torch.full((bits.shape[1],), max(first - 1, 0), dtype=torch.float64)
        counts = torch.full((bits.shape[1], 2**first, 2), 0.5, dtype=torch.float64)
        rows = torch.arange(bits.shape[1])
        context = self._code(bits[:first])
        for step in range(first, len(bits)):
            seen, bit = counts[rows, context], bits[step].long()
            if step > 0:
                cost -= (seen[rows, bit] / seen.sum(dim=-1)).log2()
            counts[rows, context, bit] += 1
            context = self._append(context, bits[step])
        return cost

    def _code(self, bits: Tensor) -> Tensor:
        """[N - 1, B] the last bits, to [B] the number of their context."""
        code = torch.zeros(bits.shape[1], dtype=torch.long)
        for bit in bits:
            code = self._append(code, bit)
        return code

    def _append(self, code: Tensor, bit: Tensor) -> Tensor:
        return torch.remainder(2 * code + bit.long(), 2 ** (self.order - 1))
