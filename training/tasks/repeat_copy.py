"""Repeat copy: hear a sequence of random bit vectors and a number, say it that many times, then stop (section 4.2).

The layout of a sequence: T steps with the vectors on the first channels; one step with only the last channel
set, to the number of repeats; then R T + 1 steps of zeros, during which the vectors are due R times over, and at the
last of them the end marker, on an output channel of its own. The number is shifted and scaled so that it has mean 0
and variance 1 over the repeats of training.

Shapes: T length of the sequence to copy, R repeats, B batch, K bits.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.tasks.patterns import patterned_bits
from training.tasks.task import Pattern, Sequences, Size, Task, in_order, random_bits


class RepeatCopyTask(Task):
    """Settings of the repeat copy task, and its sequences."""

    size_names: ClassVar = ("length", "repeats")

    name: Literal["repeat-copy"] = "repeat-copy"
    """The task."""
    num_bits: int = Field(default=8, ge=1, le=10_000)
    """Bits in a vector."""
    min_length: int = Field(default=1, ge=1, le=1000)
    """Vectors in the shortest training sequence."""
    max_length: int = Field(default=10, ge=1, le=1000)
    """Vectors in the longest training sequence."""
    min_repeats: int = Field(default=1, ge=1, le=1000)
    """Fewest repeats in training."""
    max_repeats: int = Field(default=10, ge=1, le=1000)
    """Most repeats in training."""
    blank_share: float = Field(default=0.0, ge=0, lt=1)
    """In training alone, this share of the vectors is blank, beside the one in 2^num_bits that is by chance: too few to
    learn from that a blank vector, the last one above all, is not yet the pause in which the copies are due."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> RepeatCopyTask:
        in_order("min_length", self.min_length, "max_length", self.max_length)
        in_order("min_repeats", self.min_repeats, "max_repeats", self.max_repeats)
        if self.min_repeats == self.max_repeats:
            raise ValueError("min_repeats and max_repeats are equal: there is nothing to normalise by")
        return self

    @property
    def input_size(self) -> int:
        """The bits and the number of repeats."""
        return self.num_bits + 1

    @property
    def output_size(self) -> int:
        """The bits and the end marker."""
        return self.num_bits + 1

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        mean, deviation = self._repeats_in_training()
        return (
            f"{self.num_bits} bits, then the number of repeats as (number - {mean:g}) / {deviation:.7g}, "
            "alone in its step; zeros while the copies are read"
        )

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits, then the end marker, in (0, 1), to be read at 0.5 once the number was sent"

    def sizes(self) -> list[Size]:
        """Every length with every number of repeats."""
        return [
            (length, repeats)
            for length in range(self.min_length, self.max_length + 1)
            for repeats in range(self.min_repeats, self.max_repeats + 1)
        ]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences: inputs [T + 1 + R T + 1, B, K + 1], targets [R T + 1, B, K + 1]."""
        length, repeats = size
        vectors = random_bits(length, batch_size, self.num_bits, generator=generator)
        return self._laid_out(vectors, repeats)

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences:
        """As `draw`, the vectors of a pattern."""
        length, repeats = size
        vectors = patterned_bits(pattern, length, batch_size, self.num_bits, generator=generator)
        return self._laid_out(vectors, repeats)

    def _laid_out(self, vectors: Tensor, repeats: int) -> Sequences:
        length, batch_size, _ = vectors.shape
        mean, deviation = self._repeats_in_training()
        targets = torch.zeros(repeats * length + 1, batch_size, self.output_size)
        targets[:-1, :, : self.num_bits] = vectors.repeat(repeats, 1, 1)
        targets[-1, :, self.num_bits] = 1
        inputs = torch.zeros(length + 1 + len(targets), batch_size, self.input_size)
        inputs[:length, :, : self.num_bits] = vectors
        inputs[length, :, self.num_bits] = (repeats - mean) / deviation
        return Sequences(inputs, targets)

    def draw_for_training(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """As `draw`, with more blank vectors: see `blank_share`."""
        sequences = self.draw(batch_size, size, generator)
        if self.blank_share:
            length, repeats = size
            stays = (torch.rand(length, batch_size, 1, generator=generator) >= self.blank_share).float()
            sequences.inputs[:length, :, : self.num_bits] *= stays
            sequences.targets[:-1, :, : self.num_bits] *= stays.repeat(repeats, 1, 1)
        return sequences

    def _repeats_in_training(self) -> tuple[float, float]:
        """Mean and standard deviation of a number that is uniform between the fewest and the most."""
        count = self.max_repeats - self.min_repeats + 1
        return (self.min_repeats + self.max_repeats) / 2, math.sqrt((count**2 - 1) / 12)
