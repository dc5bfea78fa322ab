"""Associative recall: hear a list of items, then one of them again, and say the one that followed it (section 4.3).

The layout of a sequence: each item is a delimiter, alone on its channel in a step of its own, and then its vectors.
After the last item the query: a step with the query delimiter, on a channel of its own, the vectors of any item but
the last, and the query delimiter again. Then as many steps of zeros as an item has vectors, during which the next
item's vectors are due.

Shapes: J items, V vectors in an item, B batch, K bits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from training.tasks.patterns import patterned_bits
from training.tasks.task import Pattern, Sequences, Size, Task, in_order, random_bits


class AssociativeRecallTask(Task):
    """Settings of the associative recall task, and its sequences."""

    size_names: ClassVar = ("items",)

    name: Literal["associative-recall"] = "associative-recall"
    """The task."""
    num_bits: int = Field(default=6, ge=1, le=10_000)
    """Bits in a vector."""
    vectors_per_item: int = Field(default=3, ge=1, le=10_000)
    """Vectors in an item."""
    min_items: int = Field(default=2, ge=2, le=100_000)
    """Items in the shortest training sequence."""
    max_items: int = Field(default=6, ge=2, le=100_000)
    """Items in the longest training sequence."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> AssociativeRecallTask:
        in_order("min_items", self.min_items, "max_items", self.max_items)
        return self

    @property
    def input_size(self) -> int:
        """The bits, the delimiter of items and the delimiter of the query."""
        return self.num_bits + 2

    @property
    def output_size(self) -> int:
        """The bits."""
        return self.num_bits

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        return (
            f"{self.num_bits} bits, then the delimiter that goes before each item of {self.vectors_per_item} vectors, "
            "then the delimiter that goes before and after the query; zeros while the answer is read"
        )

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"{self.num_bits} bits in (0, 1), to be read at 0.5 once the query was sent"

    def sizes(self) -> list[Size]:
        """Every number of items of training."""
        return [(items,) for items in range(self.min_items, self.max_items + 1)]

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences: inputs [J (V + 1) + 2 V + 2, B, K + 2], targets [V, B, K]."""
        (num_items,) = size
        items = random_bits(num_items, self.vectors_per_item, batch_size, self.num_bits, generator=generator)
        return self._laid_out(items, generator)

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences | None:
        """As `draw`, the items of a pattern, so that one alone can follow what is asked for. With "one-bit" each vector
        of an item has one bit set and no two items are the same; None if there are not as many."""
        (num_items,) = size
        length, bits = self.vectors_per_item, self.num_bits
        if pattern == "one-bit":
            if num_items > bits**length:
                return None
            codes = torch.stack(
                [torch.randperm(bits**length, generator=generator)[:num_items] for _ in range(batch_size)], 1
            )
            digits = torch.stack([codes // bits**place % bits for place in range(length)], dim=1)
            return self._laid_out(torch.nn.functional.one_hot(digits, bits).float(), generator)
        vectors = patterned_bits(pattern, num_items, batch_size, length * bits, generator=generator)
        items = vectors.view(num_items, batch_size, length, bits).transpose(1, 2)
        return self._laid_out(items, generator)

    def _laid_out(self, items: Tensor, generator: torch.Generator) -> Sequences:
        num_items, length, batch_size, bits = items.shape
        queried = torch.randint(0, num_items - 1, (batch_size,), generator=generator)
        rows = torch.arange(batch_size)

        inputs = torch.zeros(num_items * (length + 1) + 2 * length + 2, batch_size, self.input_size)
        listed = inputs[: num_items * (length + 1)].view(num_items, length + 1, batch_size, self.input_size)
        listed[:, 0, :, bits] = 1
        listed[:, 1:, :, :bits] = items
        query = inputs[num_items * (length + 1) :]
        query[0, :, bits + 1] = query[length + 1, :, bits + 1] = 1
        query[1 : length + 1, :, :bits] = items[queried, :, rows].transpose(0, 1)
        return Sequences(inputs, items[queried + 1, :, rows].transpose(0, 1))
