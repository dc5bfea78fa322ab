"""Naming: the inputs, outputs and states of a module as tensors with names.

A module takes and gives a tensor alone, or several in a mapping, a NamedTuple, a list or a tuple, nested as they like.
A key or a field is a name, an item of a list its number; names of what is nested are joined by `_`. The states of this
project's cells have the names of `training.model.named_tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from export.errors import StepError
from training.model import DNCState, NTMState, PlainState, named_tensors, with_tensors

_CELL_STATES = (NTMState, DNCState, PlainState)


def named(tree: Any, alone: str) -> dict[str, Tensor]:
    """Every tensor under its name.

    Args:
        tree: what the module takes or gives.
        alone: the name of a tensor that has no other; items of a list begin with it.

    Raises:
        StepError: something in it is no tensor, or two have one name.
    """
    pairs = list(_named(tree, "", alone))
    tensors = dict(pairs)
    if len(tensors) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise StepError(f"two tensors have the name {', '.join(twice)}: rename one")
    return tensors


def cell_states(tree: Any, prefix: str = "") -> dict[str, str]:
    """The names of tensors that are states of this project's cells, and what they are called there."""
    if isinstance(tree, _CELL_STATES):
        return {_joined(prefix, name): name for name in named_tensors(tree)}
    found: dict[str, str] = {}
    for key, part in _parts(tree):
        found |= cell_states(part, _joined(prefix, key))
    return found


def rebuilt(like: Any, tensors: Iterator[Tensor]) -> Any:
    """The structure of `like` with other tensors, in the order in which `named` gives them."""
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, _CELL_STATES):
        return with_tensors(like, {name: next(tensors) for name in named_tensors(like)})
    if isinstance(like, Mapping):
        return {key: rebuilt(part, tensors) for key, part in like.items()}
    parts = [rebuilt(part, tensors) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def _named(tree: Any, prefix: str, alone: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix or alone, tree
    elif isinstance(tree, _CELL_STATES):
        for name, tensor in named_tensors(tree).items():
            yield _joined(prefix, name), tensor
    else:
        is_numbered = isinstance(tree, list | tuple) and not hasattr(tree, "_fields")
        for key, part in _parts(tree):
            yield from _named(part, _joined(prefix or (alone if is_numbered else ""), key), alone)


def _parts(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Tensor):
        return []
    if isinstance(tree, Mapping):
        return [(str(key), part) for key, part in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return [(str(index), part) for index, part in enumerate(tree)]
    raise StepError(
        f"a step takes and gives tensors, alone, in mappings, tuples or lists, not {type(tree).__name__}"
    )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}_{name}" if prefix else name
