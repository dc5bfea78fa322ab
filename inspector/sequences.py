"""Sequences: what can be sent to a model, step after step, and the Python lines that make the same.

For a model of one of this project's tasks (its spec's `task`, and the task's settings in the provenance) a sequence is
laid out as in training, and comes with what the model should answer. Any other model takes random numbers, zeros, or
what somebody pastes or uploads. No torch: the layouts are written down here once more, and a test holds them to
training's.

Shapes: T steps, A answers (those of the last A <= T steps), K bits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import json_format

from inspector.errors import BadRequestError
from ntm.tensor import Array, numpy_dtype
from ntm.v1 import model_pb2

Generator = np.random.Generator


@dataclass(frozen=True)
class Sequence:
    """Inputs to send, with what is known of them."""

    title: str
    inputs: Array
    """[T, ...input shape]."""
    targets: npt.NDArray[np.float32] | None
    """[A, ...output shape]: what the outputs of the last A steps should be; None where nobody knows."""
    are_bits: bool
    """Whether a target is a bit that the output should be on the same side of 0.5 as."""
    python: str
    """Lines that make `inputs`."""


@dataclass(frozen=True)
class Parameter:
    """A number that a kind of sequence takes."""

    name: str
    label: str
    default: int
    least: int
    most: int


@dataclass(frozen=True)
class Kind:
    """A kind of sequence that fits a model."""

    name: str
    title: str
    parameters: tuple[Parameter, ...]
    make: Callable[..., Sequence]

    def sequence(self, given: Mapping[str, Any]) -> Sequence:
        """A sequence with these parameters; those left out have their defaults.

        Raises:
            BadRequestError: one is unknown, no whole number, or out of range.
        """
        unknown = set(given) - {parameter.name for parameter in self.parameters}
        if unknown:
            raise BadRequestError(f"{self.title} has no parameter {sorted(unknown)[0]!r}")
        values = {}
        for parameter in self.parameters:
            value = given.get(parameter.name, parameter.default)
            if not isinstance(value, int) or isinstance(value, bool):
                raise BadRequestError(f"{parameter.label} must be a whole number")
            if not parameter.least <= value <= parameter.most:
                raise BadRequestError(
                    f"{parameter.label} is {value}: choose {parameter.least} to {parameter.most}"
                )
            values[parameter.name] = value
        return self.make(**values)


MAX_STEPS = 10_000
_SEED = Parameter("seed", "Seed", 0, 0, 2**31 - 1)


def kinds(spec: model_pb2.ModelSpec) -> list[Kind]:
    """The kinds of sequence that fit a model, the best first."""
    tasks = {
        "copy": _copy,
        "repeat-copy": _repeat_copy,
        "associative-recall": _associative_recall,
        "dynamic-ngrams": _dynamic_ngrams,
        "priority-sort": _priority_sort,
    }
    made = []
    settings = _task_settings(spec)
    if spec.task in tasks and settings is not None:
        kind = tasks[spec.task](settings)
        made.append(kind)
    return [*made, _random(spec), _zeros(spec)]


def from_file(content: bytes, name: str, spec: model_pb2.ModelSpec) -> Sequence:
    """A sequence from a .npy file, or from text with a step on each line.

    Raises:
        BadRequestError: it cannot be read, or has another shape than the model's inputs.
    """
    if content.startswith(b"\x93NUMPY"):
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except ValueError as error:
            raise BadRequestError(f"{name} cannot be read as a .npy file: {error}") from error
        python = f"inputs = np.load({name!r})"
    else:
        try:
            text = content.decode("utf-8-sig").replace(",", " ").replace(";", " ")
            array = np.loadtxt(io.StringIO(text), ndmin=2) if text.strip() else np.empty(0)
        except ValueError as error:
            raise BadRequestError(
                f"{name} is neither a .npy file nor lines of numbers, one step a line: {error}"
            ) from error
        python = f"inputs = np.loadtxt({name!r}, delimiter=',', ndmin=2)"
    if array.size == 0:
        raise BadRequestError(f"{name} has no numbers in it")
    shape = tuple(spec.inputs[0].shape)
    wanted = f"[T, {', '.join(map(str, shape))}]" if shape else "[T]"
    if array.ndim == 0 or array.size % math.prod(shape) or (array.ndim > 2 and array.shape[1:] != shape):
        raise BadRequestError(f"{name} has shape {list(array.shape)}, the model takes {wanted}")
    if array.ndim <= 2 and math.prod(array.shape[1:]) not in (1, math.prod(shape)):
        raise BadRequestError(
            f"{name} has {math.prod(array.shape[1:])} numbers a step, the model takes {math.prod(shape)}"
        )
    array = array.reshape(-1, *shape)
    if not np.isfinite(array).all():
        raise BadRequestError(f"{name} has values that are not finite")
    if len(array) > MAX_STEPS:
        raise BadRequestError(f"{name} has {len(array)} steps: send {MAX_STEPS} at most")
    dtype = numpy_dtype(spec.inputs[0].dtype)
    python += f".astype(np.{dtype.name}).reshape{(-1, *shape)}"
    return Sequence(name, array.astype(dtype), None, False, python)


def by_hand(values: Any, spec: model_pb2.ModelSpec) -> Sequence:
    """One step, from numbers that somebody typed.

    Raises:
        BadRequestError: they are not numbers, or not as many as a step takes.
    """
    dtype, shape = numpy_dtype(spec.inputs[0].dtype), tuple(spec.inputs[0].shape)
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise BadRequestError(f"a step takes numbers: {error}") from error
    if array.size != math.prod(shape) or not np.isfinite(array).all():
        raise BadRequestError(f"a step takes {math.prod(shape)} finite numbers, these are {array.size}")
    inputs = array.reshape(1, *shape).astype(dtype)
    python = f"inputs = np.array({inputs.tolist()}, np.{dtype.name})"
    return Sequence("by hand", inputs, None, False, python)


def _task_settings(spec: model_pb2.ModelSpec) -> dict[str, Any] | None:
    """The settings of the task that the model was trained on; None where the spec does not tell."""
    config = json_format.MessageToDict(spec.provenance.training_config)
    task = config.get("task")
    return task if isinstance(task, dict) and task.get("name") == spec.task else None


def _copy(settings: Mapping[str, Any]) -> Kind:
    bits = int(settings["num_bits"])

    def make(length: int, seed: int) -> Sequence:
        vectors = _bits(np.random.default_rng(seed), length, bits)
        inputs = np.zeros((2 * length + 1, bits + 1), np.float32)
        inputs[:length, :bits] = vectors
        inputs[length, bits] = 1
        python = f"""\
vectors = np.random.default_rng({seed}).integers(0, 2, ({length}, {bits}))
inputs = np.zeros(({2 * length + 1}, {bits + 1}), np.float32)
inputs[:{length}, :{bits}] = vectors  # the sequence,
inputs[{length}, {bits}] = 1  # the delimiter, and silence while it is recalled"""
        return Sequence(f"copy, {length} vectors", inputs, vectors, True, python)

    length = Parameter("length", "Vectors", int(settings["max_length"]), 1, MAX_STEPS // 2)
    return Kind("copy", "Copy task", (length, _SEED), make)


def _repeat_copy(settings: Mapping[str, Any]) -> Kind:
    bits = int(settings["num_bits"])
    least, most = int(settings["min_repeats"]), int(settings["max_repeats"])
    mean, deviation = (least + most) / 2, math.sqrt(((most - least + 1) ** 2 - 1) / 12)

    def make(length: int, repeats: int, seed: int) -> Sequence:
        vectors = _bits(np.random.default_rng(seed), length, bits)
        targets = np.zeros((repeats * length + 1, bits + 1), np.float32)
        targets[:-1, :bits] = np.tile(vectors, (repeats, 1))
        targets[-1, bits] = 1
        num_steps = length + 1 + len(targets)
        inputs = np.zeros((num_steps, bits + 1), np.float32)
        inputs[:length, :bits] = vectors
        inputs[length, bits] = (repeats - mean) / deviation
        python = f"""\
vectors = np.random.default_rng({seed}).integers(0, 2, ({length}, {bits}))
inputs = np.zeros(({num_steps}, {bits + 1}), np.float32)
inputs[:{length}, :{bits}] = vectors  # the sequence,
inputs[{length}, {bits}] = ({repeats} - {mean!r}) / {deviation!r}  # how many times, and silence"""
        return Sequence(f"repeat copy, {length} vectors {repeats} times", inputs, targets, True, python)

    parameters = (
        Parameter("length", "Vectors", min(5, int(settings["max_length"])), 1, 1000),
        Parameter("repeats", "Repeats", min(3, most), 1, 100),
        _SEED,
    )
    return Kind("repeat-copy", "Repeat copy task", parameters, make)


def _associative_recall(settings: Mapping[str, Any]) -> Kind:
    bits, vectors = int(settings["num_bits"]), int(settings["vectors_per_item"])

    def make(items: int, seed: int) -> Sequence:
        generator = np.random.default_rng(seed)
        listed = _bits(generator, items, vectors, bits)
        asked = int(generator.integers(0, items - 1))
        start = items * (vectors + 1)
        inputs = np.zeros((start + 2 * vectors + 2, bits + 2), np.float32)
        each = inputs[:start].reshape(items, vectors + 1, bits + 2)
        each[:, 0, bits] = 1
        each[:, 1:, :bits] = listed
        inputs[[start, start + vectors + 1], bits + 1] = 1
        inputs[start + 1 : start + vectors + 1, :bits] = listed[asked]
        python = f"""\
items = np.random.default_rng({seed}).integers(0, 2, ({items}, {vectors}, {bits}))
inputs = np.zeros(({len(inputs)}, {bits + 2}), np.float32)
listed = inputs[:{start}].reshape({items}, {vectors + 1}, {bits + 2})
listed[:, 0, {bits}] = 1  # a delimiter before each item,
listed[:, 1:, :{bits}] = items
inputs[[{start}, {start + vectors + 1}], {bits + 1}] = 1  # the query between two of another kind,
inputs[{start + 1}:{start + vectors + 1}, :{bits}] = items[{asked}]  # and silence for the item after it"""
        return Sequence(
            f"associative recall, item {asked + 1} of {items}", inputs, listed[asked + 1], True, python
        )

    items = Parameter("items", "Items", int(settings["max_items"]), 2, 1000)
    return Kind("associative-recall", "Associative recall task", (items, _SEED), make)


def _dynamic_ngrams(settings: Mapping[str, Any]) -> Kind:
    order = int(settings["order"])

    def make(bits: int, seed: int) -> Sequence:
        generator = np.random.default_rng(seed)
        table = generator.beta(0.5, 0.5, 2 ** (order - 1))
        drawn = list(generator.integers(0, 2, order - 1))
        while len(drawn) < bits:
            context = int("".join(str(bit) for bit in drawn[len(drawn) - order + 1 :]) or "0", 2)
            drawn.append(int(generator.random() < table[context]))
        sequence = np.array(drawn[:bits], np.float32)[:, np.newaxis]
        python = f"""\
generator = np.random.default_rng({seed})
table = generator.beta(0.5, 0.5, {2 ** (order - 1)})  # the chance of a 1 after each {order - 1} bits
bits = list(generator.integers(0, 2, {order - 1}))
while len(bits) < {bits}:
    context = int("".join(str(bit) for bit in bits[len(bits) - {order - 1}:]) or "0", 2)
    bits.append(int(generator.random() < table[context]))
inputs = np.array(bits[:{bits - 1}], np.float32)[:, np.newaxis]"""
        return Sequence(f"dynamic N-grams, {bits} bits", sequence[:-1], sequence[1:], False, python)

    bits = Parameter("bits", "Bits", int(settings["num_bits"]), order + 1, MAX_STEPS)
    return Kind("dynamic-ngrams", "Dynamic N-grams task", (bits, _SEED), make)


def _priority_sort(settings: Mapping[str, Any]) -> Kind:
    bits = int(settings["num_bits"])

    def make(vectors: int, due: int, seed: int) -> Sequence:
        if due > vectors:
            raise BadRequestError(f"Vectors due are {due}: choose {vectors} at most, as many as are heard")
        generator = np.random.default_rng(seed)
        heard = _bits(generator, vectors, bits)
        priorities = generator.uniform(-1, 1, vectors).astype(np.float32)
        inputs = np.zeros((vectors + due, bits + 1), np.float32)
        inputs[:vectors, :bits] = heard
        inputs[:vectors, bits] = priorities
        targets = heard[(-priorities).argsort(kind="stable")[:due]]
        python = f"""\
generator = np.random.default_rng({seed})
inputs = np.zeros(({vectors + due}, {bits + 1}), np.float32)
inputs[:{vectors}, :{bits}] = generator.integers(0, 2, ({vectors}, {bits}))
inputs[:{vectors}, {bits}] = generator.uniform(-1, 1, {vectors})  # the priorities, and silence"""
        return Sequence(f"priority sort, {due} of {vectors} vectors", inputs, targets, True, python)

    parameters = (
        Parameter("vectors", "Vectors", int(settings["num_vectors"]), 1, 1000),
        Parameter("due", "Vectors due", int(settings["num_sorted"]), 1, 1000),
        _SEED,
    )
    return Kind("priority-sort", "Priority sort task", parameters, make)


def _random(spec: model_pb2.ModelSpec) -> Kind:
    dtype, shape = numpy_dtype(spec.inputs[0].dtype), tuple(spec.inputs[0].shape)

    def make(steps: int, seed: int) -> Sequence:
        generator = np.random.default_rng(seed)
        if dtype.kind == "f":
            inputs = generator.standard_normal((steps, *shape)).astype(dtype)
            drawn = f"standard_normal({(steps, *shape)}).astype(np.{dtype.name})"
        else:
            most = 2 if dtype.kind == "b" else 100
            inputs = generator.integers(0, most, (steps, *shape)).astype(dtype)
            drawn = f"integers(0, {most}, {(steps, *shape)}).astype(np.{dtype.name})"
        python = f"inputs = np.random.default_rng({seed}).{drawn}"
        return Sequence(f"random, {steps} steps", inputs, None, False, python)

    return Kind("random", "Random numbers", (Parameter("steps", "Steps", 40, 1, MAX_STEPS), _SEED), make)


def _zeros(spec: model_pb2.ModelSpec) -> Kind:
    dtype, shape = numpy_dtype(spec.inputs[0].dtype), tuple(spec.inputs[0].shape)

    def make(steps: int) -> Sequence:
        inputs = np.zeros((steps, *shape), dtype)
        python = f"inputs = np.zeros({(steps, *shape)}, np.{dtype.name})"
        return Sequence(f"zeros, {steps} steps", inputs, None, False, python)

    return Kind("zeros", "Zeros", (Parameter("steps", "Steps", 10, 1, MAX_STEPS),), make)


def _bits(generator: Generator, *shape: int) -> npt.NDArray[np.float32]:
    return generator.integers(0, 2, shape).astype(np.float32)
