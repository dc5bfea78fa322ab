"""What a task is to training, evaluation and export; each of the other files here is one.

Shapes: T steps, A answers, B batch, I input size, O output size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from training.errors import TaskError
from training.losses import LOSSES, Loss

Size = tuple[int, ...]
"""How large a sequence is, in the numbers that `Task.size_names` names, such as (20,) or (10, 3)."""

Pattern = Literal["zeros", "equal", "one-bit", "periodic"]
"""What vectors may be in place of random: all bits 0, all vectors of a sequence the same, a single bit of the sequence
1, vectors that recur after two to five. `patterns.py` draws them."""

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


class Sequences(NamedTuple):
    """A batch of sequences, with what the model should answer at the end of each."""

    inputs: Tensor
    """[T, B, I]."""
    targets: Tensor
    """What the task's loss compares with the outputs of the last A <= T steps; before those the output does not count.
    [A, B, O] in [0, 1] for bits, [A, B] integers for classes, [A, B, O] for numbers."""
    mask: Tensor | None = None
    """[A, B], True where an answer counts; None where all do."""

    def part(self, rows: slice, device: torch.device) -> Sequences:
        """Some sequences of the batch, on a device."""
        inputs, targets, mask = (None if tensor is None else tensor[:, rows].to(device) for tensor in self)
        assert inputs is not None
        assert targets is not None
        return Sequences(inputs, targets, mask)


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
    def loss(self) -> Loss:
        """What the outputs stand for, and what it costs to be wrong; bits unless a task says otherwise."""
        return LOSSES["binary-cross-entropy"]

    @property
    def goal(self) -> Goal:
        """When the task is solved; an error of less than 0.1 unless a task says otherwise."""
        return Goal(self.loss.error_name, 0.1)

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

    def draw_mixed(self, sizes: list[Size], generator: torch.Generator) -> Sequences:
        """Sequences to train on, each of a size of its own, the shorter ones padded behind their end."""
        items: list[Any] = [None] * len(sizes)
        for size in sorted(set(sizes)):
            rows = [row for row, own in enumerate(sizes) if own == size]
            inputs, targets, mask = self.draw_for_training(len(rows), size, generator)
            counts = torch.ones(targets.shape[:2], dtype=torch.bool) if mask is None else mask
            for index, row in enumerate(rows):
                items[row] = inputs[:, index], targets[:, index], counts[:, index]
        return padded(items)

    def check_size(self, size: Size) -> None:
        """Raise ValueError, in words for the person who asked for it, if there are no sequences of this size."""

    def optimal_cost(self, sequences: Sequences) -> Tensor | None:
        """[B], the bits that the best possible predictor pays for each sequence; None where that is 0."""
        return None

    def check(self, sequences: Sequences, batch_size: int) -> Sequences:
        """The same sequences, if they are what the task says.

        Raises:
            TaskError: they are of another shape or range. A task of one's own is told what is wrong with it.
        """
        inputs, targets, mask = sequences
        expected = f"[steps, {batch_size}, {self.input_size}]"
        problem = ""
        if inputs.dim() != 3 or inputs.shape[1:] != (batch_size, self.input_size):
            problem = f"inputs must be {expected}, not {list(inputs.shape)}"
        elif not bool(inputs.isfinite().all()):
            problem = "inputs must be finite numbers"
        elif not 1 <= len(targets) <= len(inputs) or targets.shape[1] != batch_size:
            problem = (
                f"targets must be [answers, {batch_size}, ...] with 1 to {len(inputs)} answers, "
                f"not {list(targets.shape)}"
            )
        elif mask is not None and (mask.dtype != torch.bool or mask.shape != targets.shape[:2]):
            problem = f"the mask must be bool {list(targets.shape[:2])}, not {mask.dtype} {list(mask.shape)}"
        elif mask is not None and not bool(mask.any()):
            problem = "the mask leaves out every answer"
        try:
            if not problem:
                self.loss.check(targets, self.output_size)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise TaskError(f"the task {self.name} draws sequences that it cannot: {problem}")
        return sequences


def padded(items: list[tuple[Tensor, Tensor, Tensor]]) -> Sequences:
    """A batch of sequences of any lengths, the shorter ones padded behind their end; nothing there counts.

    Args:
        items: of each sequence inputs [t, I], targets [a, ...] and mask [a], a <= t.
    """
    shapes = {(len(inputs), len(targets)) for inputs, targets, _ in items}
    if len(shapes) == 1:
        inputs, targets, mask = (torch.stack(parts, dim=1) for parts in zip(*items, strict=True))
        return Sequences(inputs, targets, None if bool(mask.all()) else mask)
    num_steps = max(num_steps for num_steps, _ in shapes)
    first_inputs, first_targets, _ = items[0]
    inputs = first_inputs.new_zeros(num_steps, len(items), *first_inputs.shape[1:])
    targets = first_targets.new_zeros(num_steps, len(items), *first_targets.shape[1:])
    mask = torch.zeros(num_steps, len(items), dtype=torch.bool)
    for row, (own_inputs, own_targets, own_mask) in enumerate(items):
        end = len(own_inputs)
        inputs[:end, row] = own_inputs
        targets[end - len(own_targets) : end, row] = own_targets
        mask[end - len(own_targets) : end, row] = own_mask
    return Sequences(inputs, targets, mask)


def in_order(shortest: str, least: int, longest: str, most: int) -> None:
    """Raise ValueError, in words for the person who set them, if two bounds are the wrong way round."""
    if least > most:
        raise ValueError(f"{shortest} {least} is greater than {longest} {most}")


def random_bits(*shape: int, generator: torch.Generator) -> Tensor:
    """0 or 1, evenly, as floats."""
    return torch.randint(0, 2, shape, generator=generator).float()
