"""Data set: sequences from files, or from a torch Dataset of one's own.

An `.npz` file holds S sequences:

    inputs    [S, T, I] numbers, or [S, T] integers: symbols, fed one-hot
    targets   [S, A, O] bits or numbers, or [S, A] integers: classes; of the last A <= T steps
    mask      [S, A], optional: which answers count
    lengths   [S], optional: how many of the T steps belong to each sequence, with A = T; what is behind is padding

An item of a Dataset is one sequence: inputs [t, I] or [t], targets [a, O] or [a] and, if need be, a mask [a].
Sequences may differ in length: a batch is padded behind their ends, and nothing there counts.

Shapes: S sequences, T steps, A answers, I input size, O output size, B batch; t and a of one sequence.
"""

from __future__ import annotations

import functools
import inspect
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from training.errors import SettingsError, TaskError
from training.import_path import find
from training.losses import LOSSES, Loss, LossName
from training.tasks.task import Goal, Sequences, Size, Task, padded

Item = tuple[Tensor, Tensor, Tensor]
"""Inputs, targets and mask of one sequence."""


class DatasetTask(Task):
    """Settings of a data set, and its sequences."""

    size_names: ClassVar = ("steps",)

    name: Literal["dataset"] = "dataset"
    """The task."""
    train: str = Field(min_length=1)
    """What to train on: an .npz file, or the import path module:name of a torch Dataset or of what makes one."""
    validation: str = Field(min_length=1)
    """What to judge the model by, likewise."""
    loss_name: LossName = "binary-cross-entropy"
    """"binary-cross-entropy" of bits, "cross-entropy" of classes, or "mean-squared-error" of numbers."""
    num_symbols: int | None = Field(default=None, ge=1)
    """How many symbols there are, where inputs are integers."""
    num_classes: int | None = Field(default=None, ge=2)
    """How many classes there are, where targets are."""
    solved_below: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """The task is solved when the error in a sequence, in wrong bits, wrong symbols or squared error, is less."""
    about_inputs: str = ""
    """What the numbers of an input mean, for people who call the served model."""
    about_outputs: str = ""
    """What the numbers of an output mean, likewise."""

    @model_validator(mode="after")
    def _classes_are_counted(self) -> DatasetTask:
        if (self.loss_name == "cross-entropy") != (self.num_classes is not None):
            raise ValueError("num_classes goes with loss_name cross-entropy, which needs it")
        return self

    @property
    def loss(self) -> Loss:
        """By its name."""
        return LOSSES[self.loss_name]

    @property
    def goal(self) -> Goal:
        """By the setting."""
        return Goal(self.loss.error_name, self.solved_below)

    @property
    def input_size(self) -> int:
        """I."""
        inputs, _, _ = self._item(self.train, 0)
        return inputs.shape[1]

    @property
    def output_size(self) -> int:
        """O."""
        _, targets, _ = self._item(self.train, 0)
        return self.num_classes or targets.shape[-1]

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        symbols = "" if self.num_symbols is None else f"one of {self.num_symbols} symbols, one-hot"
        return self.about_inputs or symbols

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        classes = "" if self.num_classes is None else f"the probability of each of {self.num_classes} classes"
        return self.about_outputs or classes

    def sizes(self) -> list[Size]:
        """One, the steps of the longest sequence that the model is judged by."""
        return [(_longest(self.validation),)]

    def check_size(self, size: Size) -> None:
        """There is no other."""
        if size != self.sizes()[0]:
            raise ValueError(f"its sequences have the length they have, at most {self.sizes()[0][0]} steps")

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Sequences to judge by, each once before any is there twice."""
        num_sequences = len(_open(self.validation))
        rounds = -(-batch_size // num_sequences)
        order = torch.cat([torch.randperm(num_sequences, generator=generator) for _ in range(rounds)])
        return self._batch(self.validation, order[:batch_size].tolist())

    def draw_for_training(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Sequences to train on, each as likely as any other."""
        return self._batch(
            self.train,
            torch.randint(len(_open(self.train)), (batch_size,), generator=generator).tolist(),
        )

    def _batch(self, source: str, indices: list[int]) -> Sequences:
        return padded([self._item(source, index) for index in indices])

    def _item(self, source: str, index: int) -> Item:
        """One sequence: inputs [t, I], targets [a, O] or [a], mask [a]."""
        item = _open(source)[index]
        inputs, targets, *mask = (torch.as_tensor(part) for part in item)
        if not inputs.is_floating_point():
            inputs = self._one_hot(inputs, source)
        targets = targets.float() if self.num_classes is None else targets.long()
        if not 1 <= len(targets) <= len(inputs):
            raise TaskError(f"{source}: sequence {index} has {len(inputs)} steps and {len(targets)} answers")
        counts = mask[0].bool() if mask else torch.ones(len(targets), dtype=torch.bool)
        return inputs.float(), targets, counts

    def _one_hot(self, inputs: Tensor, source: str) -> Tensor:
        if self.num_symbols is None:
            raise TaskError(f"{source} has integers as inputs: say by task.num_symbols how many there are")
        if inputs.dim() != 1 or not bool(((inputs >= 0) & (inputs < self.num_symbols)).all()):
            raise TaskError(f"{source}: symbols must be [steps] from 0 to {self.num_symbols - 1}")
        return F.one_hot(inputs.long(), self.num_symbols).float()


class _Arrays:
    """The sequences of an .npz file, one by one and without padding."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zipfile.error) as error:
            raise TaskError(f"{path} cannot be read as .npz: {error}") from None
        unknown = arrays.keys() - {"inputs", "targets", "mask", "lengths"}
        if unknown or not {"inputs", "targets"} <= arrays.keys():
            raise TaskError(
                f"{path} must hold inputs and targets, and may hold mask and lengths; it has {', '.join(arrays)}"
            )
        self._inputs, self._targets = arrays["inputs"], arrays["targets"]
        self._mask, self._lengths = arrays.get("mask"), arrays.get("lengths")
        if len({len(array) for array in arrays.values()}) != 1 or len(self._inputs) == 0:
            counts = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
            raise TaskError(f"{path} must have as many of each, and at least one sequence; it has {counts}")
        if self._lengths is not None:
            num_steps = self._inputs.shape[1]
            if self._targets.shape[1] != num_steps:
                raise TaskError(
                    f"{path}: with lengths, targets must be for all {num_steps} steps; use a mask as well"
                )
            if not bool(((self._lengths >= 1) & (self._lengths <= num_steps)).all()):
                raise TaskError(f"{path}: lengths must be from 1 to {num_steps}")

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        parts = [self._inputs[index], self._targets[index]]
        if self._mask is not None:
            parts.append(self._mask[index])
        if self._lengths is None:
            return parts
        length = int(self._lengths[index])
        return [part[:length] for part in parts]


@functools.cache
def _open(source: str) -> Any:
    """The sequences by number: of an .npz file, or a torch Dataset."""
    if ":" not in source:
        return _Arrays(Path(source))
    found = find(source, "task.train or task.validation")
    is_maker = inspect.isclass(found) or (callable(found) and not hasattr(found, "__getitem__"))
    dataset = found() if is_maker else found
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise SettingsError(f"{source!r} is no torch Dataset with a length of at least 1, nor makes one")
    return dataset


@functools.cache
def _longest(source: str) -> int:
    dataset = _open(source)
    return max(len(dataset[index][0]) for index in range(len(dataset)))
