"""What a task is to training, evaluation and export; each of the other files here is one.

Shapes: T steps, B batch, I input size, O output size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Size = tuple[int, ...]
"""How large a sequence is, in the numbers that `Task.size_names` names, such as (20,) or (10, 3)."""

Pattern = Literal["zeros", "equal", "one-bit", "periodic"]
"""What vectors may be in place of random: all bits 0, all vectors of a sequence the same, a single bit of the sequence
1, vectors that recur after two to five. `patterns.py` draws them."""

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


class Sequences(NamedTuple):
    """A batch of sequences of one size, with what the model should answer at the end of each."""

    inputs: Tensor
    """[T, B, I]."""
    targets: Tensor
    """[A, B, O], 0 or 1: the answers of the last A <= T steps; before those the output does not count."""


class Goal(NamedTuple):
    """When a task counts as solved."""

    measure: str
    """A score of `evaluate.py` at the sizes of training."""
    below: float
    """The task is solved when the score is less."""


class Task(BaseModel, ABC):
    """Settings of a task, and its sequences.

    A subclass adds a field `name`, a `Literal` with the one name it has in a TOML, and its own settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size_names: ClassVar[tuple[str, ...]]
    """What the numbers of a size count, such as ("length",)."""
    goal: ClassVar[Goal] = Goal("wrong_bits", 0.1)
    """When the task is solved."""

    name: str
    """The task."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """I."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """O."""

    @property
    @abstractmethod
    def input_description(self) -> str:
        """For people who call the served model."""

    @property
    @abstractmethod
    def output_description(self) -> str:
        """For people who call the served model."""

    @abstractmethod
    def sizes(self) -> list[Size]:
        """Every size of training, each equally likely."""

    @abstractmethod
    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences of a size."""

    def draw_for_training(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """As `draw`, unless a task has settings that show a model more often what is rare."""
        return self.draw(batch_size, size, generator)

    def draw_patterned(
        self, pattern: Pattern, batch_size: int, size: Size, generator: torch.Generator
    ) -> Sequences | None:
        """Sequences of a size whose vectors are not random but of a pattern; None where the task has no such."""
        return None

    def draw_size(self, generator: torch.Generator) -> Size:
        """One of the sizes of training."""
        sizes = self.sizes()
        return sizes[int(torch.randint(len(sizes), (), generator=generator))]

    def optimal_cost(self, sequences: Sequences) -> Tensor | None:
        """[B], the bits that the best possible predictor pays for each sequence; None where that is 0."""
        return None


def in_order(shortest: str, least: int, longest: str, most: int) -> None:
    """Raise ValueError, in words for the person who set them, if two bounds are the wrong way round."""
    if least > most:
        raise ValueError(f"{shortest} {least} is greater than {longest} {most}")


def random_bits(*shape: int, generator: torch.Generator) -> Tensor:
    """0 or 1, evenly, as floats."""
    return torch.randint(0, 2, shape, generator=generator).float()
