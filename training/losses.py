"""Losses: what a model's outputs stand for, and what it pays for them where they differ from the targets.

A task names one of three. Training takes its mean, evaluation its scores, and export the function that turns outputs
into what the served model answers.

Shapes: A answers, B batch, O output size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["binary-cross-entropy", "cross-entropy", "mean-squared-error"]
Scores = dict[str, float]


class Loss(ABC):
    """What the outputs of a model stand for."""

    name: ClassVar[LossName]
    error_name: ClassVar[str]
    """What `errors` says of a sequence, such as `wrong_bits`."""
    is_error_counted: ClassVar[bool] = True
    """A sequence's error is the sum over its answers, and not their mean."""

    @abstractmethod
    def costs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[A, B], what each answer costs, a mean over what the answer consists of: this is what training lowers."""

    @abstractmethod
    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[A, B], how wrong each answer is, in the unit that `error_name` names."""

    @abstractmethod
    def activate(self, outputs: Tensor) -> Tensor:
        """[..., O] to what a served model answers."""

    @abstractmethod
    def scores(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """[B] for each sequence, by name; what `error_name` names goes first."""

    @abstractmethod
    def check(self, targets: Tensor, output_size: int) -> None:
        """Raise ValueError, in words for whoever made them, if these cannot be targets."""

    @abstractmethod
    def picture(self, targets: Tensor, output_size: int) -> Tensor:
        """The targets as the outputs that would meet them, [..., O]."""


class BinaryCrossEntropy(Loss):
    """Outputs are bits, as logits; targets [A, B, O] are in [0, 1]."""

    name = "binary-cross-entropy"
    error_name = "wrong_bits"

    def costs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """In nats a bit."""
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=-1)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Bits, read at 0.5, that differ."""
        return ((outputs > 0) != (targets > 0.5)).sum(dim=-1).float()

    def activate(self, outputs: Tensor) -> Tensor:
        """The probability that each bit is 1."""
        return torch.sigmoid(outputs)

    def scores(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`wrong_bits` and `cost_bits`, the cross-entropy in bits, of a whole sequence."""
        return {
            "wrong_bits": _sum(self.errors(outputs, targets), mask),
            "cost_bits": _sum(self.costs(outputs, targets), mask) * outputs.shape[-1] / math.log(2),
        }

    def check(self, targets: Tensor, output_size: int) -> None:
        """They are probabilities."""
        _check_shape(targets, output_size)
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"targets of {self.name} must be from 0 to 1, not {_range(targets)}")

    def picture(self, targets: Tensor, output_size: int) -> Tensor:
        """As they are."""
        return targets


class CrossEntropy(Loss):
    """An output is one of O classes, as logits; targets [A, B] are its number, as integers."""

    name = "cross-entropy"
    error_name = "wrong_symbols"

    def costs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """In nats."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 where another class has the greatest probability."""
        return (outputs.argmax(dim=-1) != targets).float()

    def activate(self, outputs: Tensor) -> Tensor:
        """The probability of each class."""
        return torch.softmax(outputs, dim=-1)

    def scores(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`wrong_symbols` and `cost_bits` of a sequence, and `error_rate`, the share of answers that are wrong."""
        wrong = _sum(self.errors(outputs, targets), mask)
        num_answers = _sum(torch.ones_like(targets), mask)
        return {
            "wrong_symbols": wrong,
            "error_rate": wrong / num_answers.clamp_min(1),
            "cost_bits": _sum(self.costs(outputs, targets), mask) / math.log(2),
        }

    def check(self, targets: Tensor, output_size: int) -> None:
        """They are integers from 0 to O - 1."""
        if targets.dim() != 2 or targets.dtype != torch.long:
            raise ValueError(
                f"targets of {self.name} must be int64 [answers, batch], not {_described(targets)}"
            )
        if not bool(((targets >= 0) & (targets < output_size)).all()):
            raise ValueError(
                f"targets of {self.name} must be from 0 to {output_size - 1}, not {_range(targets)}; "
                "leave out by the mask what is not due"
            )

    def picture(self, targets: Tensor, output_size: int) -> Tensor:
        """One-hot."""
        return F.one_hot(targets, output_size).float()


class MeanSquaredError(Loss):
    """Outputs are numbers, as they are; targets [A, B, O] as well."""

    name = "mean-squared-error"
    error_name = "squared_error"
    is_error_counted = False

    def costs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The square of the difference."""
        return (outputs - targets).square().mean(dim=-1)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As `costs`."""
        return self.costs(outputs, targets)

    def activate(self, outputs: Tensor) -> Tensor:
        """As they are."""
        return outputs

    def scores(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """`squared_error`, the mean over all numbers that are due."""
        num_answers = _sum(torch.ones(targets.shape[:2]), mask)
        return {"squared_error": _sum(self.costs(outputs, targets), mask) / num_answers.clamp_min(1)}

    def check(self, targets: Tensor, output_size: int) -> None:
        """They are numbers."""
        _check_shape(targets, output_size)
        if not bool(targets.isfinite().all()):
            raise ValueError(f"targets of {self.name} must be finite numbers, not {_range(targets)}")

    def picture(self, targets: Tensor, output_size: int) -> Tensor:
        """As they are."""
        return targets


LOSSES: dict[LossName, Loss] = {
    loss.name: loss for loss in (BinaryCrossEntropy(), CrossEntropy(), MeanSquaredError())
}
"""Every loss by its name."""


def mean(values: Tensor, mask: Tensor | None, num_counted: float | None = None) -> Tensor:
    """The mean of [A, B] values over the answers that count.

    Args:
        values: [A, B].
        mask: [A, B], True where an answer counts; None if all do.
        num_counted: to divide by; the answers that count if not given.
    """
    if mask is not None:
        # What does not count may be infinite, and 0 times infinity is no number.
        values = values.masked_fill(~mask, 0)
    counted = num_counted or (values.numel() if mask is None else mask.sum().clamp_min(1))
    return values.sum() / counted


def _sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """[A, B] values to the sums [B] over the answers that count, in double precision."""
    counted = values if mask is None else values.masked_fill(~mask, 0)
    return counted.double().sum(dim=0)


def _check_shape(targets: Tensor, output_size: int) -> None:
    if targets.dim() != 3 or targets.shape[-1] != output_size or not targets.is_floating_point():
        raise ValueError(f"targets must be floats [answers, batch, {output_size}], not {_described(targets)}")


def _described(targets: Tensor) -> str:
    return f"{str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}"


def _range(targets: Tensor) -> str:
    return f"{targets.min().item():g} to {targets.max().item():g}"
