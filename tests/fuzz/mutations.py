"""Mutations: inputs that are nearly right, since what is plainly wrong is refused at the first look.

Bytes are damaged as lines and disks damage them. Messages, JSON and text are changed in their structure, so that they
still parse and what is behind the parser is reached. All is drawn from the generator that is given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ntm.v1 import tensor_pb2

_INTEGERS = [0, 1, 2, 3, 4, 7, 16, 64, 65, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1]
INTEGERS = [*_INTEGERS, *(-number for number in _INTEGERS), -(2**63), 2**64 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    *(
        "",
        "a",
        "x",
        "y",
        "s",
        "sum",
        "-",
        "~",
        ".",
        "a/b",
        "a b",
        "ä",
        "\x00",
        "\n",
        "0",
        "-1",
        "1e9",
        "x" * 129,
    ),
    *(
        "ntm.reset",
        "ntm.initial.x",
        "sequence~",
        "null",
        "NaN",
        "\U0001f600",
        "%s",
        "{0}",
        "../..",
        "x" * 5000,
    ),
]
_PIECES = [b"", b"\x00", b"\xff", b"\xff" * 8, b"{", b"}", b"[" * 100, b'"', b"\x80", b"\x0a", b"\x7f" * 10]
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MOST_CHANGES = 4
_MOST_DEPTH = 4


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes, a few of which are flipped, gone, doubled, moved or replaced."""
    for _ in range(chance.randint(1, _MOST_CHANGES)):
        data = chance.choice(_DAMAGES)(data, chance)
    return data


def _flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))]


def _remove(data: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    return data[:start] + data[start + chance.randint(1, 8) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    part = data[start : start + chance.randint(1, 32)]
    return data[:start] + part * chance.randint(1, 8) + data[start:]


def _insert(data: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    piece = chance.choice(_PIECES) if chance.random() < 0.5 else chance.randbytes(chance.randint(1, 16))
    return data[:start] + piece + data[start + chance.choice([0, len(piece)]) :]


def _write_a_number(data: bytes, chance: random.Random) -> bytes:
    start, width = chance.randint(0, len(data)), chance.choice([1, 2, 4, 8])
    number = (chance.choice(INTEGERS) % 256**width).to_bytes(width, "little")
    return data[:start] + number + data[start + width :]


_DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    _flip,
    _cut,
    _remove,
    _repeat,
    _insert,
    _write_a_number,
]


def changed_message(message: Message, chance: random.Random) -> None:
    """Change some fields of a message, in place, at any depth."""
    for _ in range(chance.randint(1, _MOST_CHANGES)):
        _change_a_field(message, chance, _MOST_DEPTH)


def _change_a_field(message: Message, chance: random.Random, depth: int) -> None:
    if not message.DESCRIPTOR.fields:
        return
    # Mostly what is there, so that changes come to lie deep; now and then something else.
    present = [field for field, _ in message.ListFields()]
    field = chance.choice(present if present and chance.random() < 0.7 else message.DESCRIPTOR.fields)
    if isinstance(message, tensor_pb2.Tensor) and chance.random() < 0.3:
        _reshape(message, chance)
    elif chance.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_a_map(message, field, chance, depth)
    elif field.is_repeated:
        _change_a_list(message, field, chance, depth)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if depth:
            _change_a_field(inner, chance, depth - 1)
    else:
        _set(message, field, _scalar(field, getattr(message, field.name), chance))


def _change_a_list(message: Message, field: Any, chance: random.Random, depth: int) -> None:
    items = getattr(message, field.name)
    what = chance.randrange(4)
    if what == 0 and len(items):
        del items[chance.randrange(len(items))]
    elif field.message_type is not None:
        if what == 1 and len(items):
            items.add().CopyFrom(chance.choice(items))
        elif what == 2 or not len(items):
            items.add()
        if depth and len(items):
            _change_a_field(chance.choice(items), chance, depth - 1)
    else:
        value = _scalar(field, items[0] if len(items) else None, chance)
        if what == 1 or not len(items):
            items.extend([value] * chance.choice([1, 1, 1, 2, 70]))
        else:
            items[chance.randrange(len(items))] = value


def _change_a_map(message: Message, field: Any, chance: random.Random, depth: int) -> None:
    items, value = getattr(message, field.name), field.message_type.fields_by_name["value"]
    key = chance.choice([*items]) if len(items) and chance.random() < 0.7 else chance.choice(TEXTS)
    if not isinstance(key, str) or not _is_text(key):
        return
    if value.message_type is None:
        items[key] = _scalar(value, None, chance)
    elif depth:
        _change_a_field(items[key], chance, depth - 1)


def _reshape(tensor: tensor_pb2.Tensor, chance: random.Random) -> None:
    """Another shape or dtype, with as many bytes as it takes, where that is few."""
    if chance.random() < 0.3:
        tensor.dtype = chance.choice([*tensor_pb2.DataType.values(), 99])
    shape = [chance.choice([*tensor.shape, 0, 1, 2, 3]) for _ in range(chance.randint(0, 4))]
    if chance.random() < 0.1:
        shape = [chance.choice([0, 2**32, 2**62, -1]) for _ in range(chance.randint(1, 70))]
    elif chance.random() < 0.5:
        shape = [chance.choice([1, 1, 2, 5, 16, 17]), *tensor.shape[1:]]
    del tensor.shape[:]
    tensor.shape.extend(shape)
    size = chance.choice([1, 2, 4, 4, 8])
    for axis in shape:
        size *= axis
    if chance.random() < 0.02 and len(shape):
        # Many steps: a large message.
        most = chance.choice([2**15, 2**17, 2**18])
        tensor.shape[0] = most // max(1, abs(size // (shape[0] or 1)))
        size = size // (shape[0] or 1) * tensor.shape[0]
    if 0 <= size <= 2**18:
        tensor.raw = chance.choice([bytes(size), chance.randbytes(size)])


def _scalar(field: Any, value: Any, chance: random.Random) -> Any:
    if field.cpp_type in _RANGES:
        least, most = _RANGES[field.cpp_type]
        number = chance.choice(INTEGERS)
        if isinstance(value, int) and chance.random() < 0.3:
            number = value + chance.choice([-1, 1])
        return min(max(number, least), most)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return chance.choice(FLOATS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return chance.choice([*(each.number for each in field.enum_type.values), 99])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return damaged(value or b"", chance)
    return chance.choice(TEXTS)


def _set(message: Message, field: Any, value: Any) -> None:
    with suppress(ValueError):  # an enumeration that is closed takes no other numbers
        setattr(message, field.name, value)


def _is_text(text: str) -> bool:
    return text.isprintable()


def changed_json(value: Any, chance: random.Random) -> Any:
    """JSON, some part of which is another; returns it."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice([*value])
        what = chance.random()
        if what < 0.1:
            return {key: each for key, each in value.items() if key != name}
        if what < 0.15:
            return {**value, chance.choice(TEXTS): value[name]}
        return {**value, name: changed_json(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place, what = chance.randrange(len(value)), chance.random()
        if what < 0.1:
            return value[:place] + value[place + 1 :]
        if what < 0.2:
            return value[:place] + [value[place]] * 3 + value[place + 1 :]
        return [*value[:place], changed_json(value[place], chance), *value[place + 1 :]]
    if isinstance(value, str) and value and chance.random() < 0.3:
        return damaged(value.encode("utf-8", "replace"), chance).decode("utf-8", "replace")
    others: list[Any] = [None, True, [], {}, [[]], {"": None}, 10**400, "9" * 5000]
    return chance.choice([*others, *INTEGERS, *FLOATS, *TEXTS])


_TOKEN = re.compile(r'"[^"\n]*"|-?\d+(?:\.\d+)?|\w+|[{}\[\]:,]')


def changed_text(text: str, chance: random.Random) -> str:
    """Text of words, numbers and brackets, some of which are others, gone, doubled or exchanged."""
    for _ in range(chance.randint(1, _MOST_CHANGES)):
        tokens = [*_TOKEN.finditer(text)]
        if not tokens:
            return text
        token, other = chance.choice(tokens), chance.choice(tokens).group()
        replacement = chance.choice(
            [
                "",
                token.group() * 2,
                other,
                other,
                str(chance.choice(INTEGERS)),
                f'"{chance.choice(TEXTS)}"',
                "[" * chance.choice([1, 2000]),
                "{" * chance.choice([1, 2000]),
            ]
        )
        text = text[: token.start()] + replacement + text[token.end() :]
    return text
