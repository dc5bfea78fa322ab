"""State: everything that passes from one step to the next, and by what name.

The cells make and consume it. The names given here are the names of the exported graph's inputs, so they are what a
caller of the server sees.

Shapes: B batch, N memory rows, M row width, R read heads, W write heads, C controller size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class LSTMState(NamedTuple):
    """What an LSTM layer carries along."""

    hidden: Tensor
    """[B, C], in (-1, 1)."""
    cell: Tensor
    """[B, C]."""


class HiddenState(NamedTuple):
    """What a layer of gated or minimal gated units carries along."""

    hidden: Tensor
    """[B, C], in (-1, 1)."""


LayerState = LSTMState | HiddenState
ControllerState = tuple[LayerState, ...]
"""Layer by layer; a feed-forward controller carries nothing along."""


class NTMState(NamedTuple):
    """The whole state of the machine between two steps."""

    memory: Tensor
    """[B, M, N]: the memory rows are the last axis."""
    read_weightings: Tensor
    """[B, R, N], each row in [0, 1] and summing to 1."""
    write_weightings: Tensor
    """[B, W, N], each row in [0, 1] and summing to 1."""
    read_vectors: Tensor
    """[B, R, M], what the read heads read at the last step."""
    controller: ControllerState


class DNCState(NamedTuple):
    """The whole state of a Differentiable Neural Computer between two steps."""

    memory: Tensor
    """[B, M, N]: the memory rows are the last axis."""
    usage: Tensor
    """[B, N], in [0, 1]: 0 is free."""
    write_weightings: Tensor
    """[B, 1, N], in [0, 1], summing to at most 1."""
    precedence: Tensor
    """[B, N], in [0, 1], summing to at most 1: how far each row was the last one written."""
    links: Tensor
    """[B, N, N], in [0, 1]: element i, j says how far row i was written right after row j."""
    read_weightings: Tensor
    """[B, R, N], in [0, 1], each row summing to at most 1."""
    read_vectors: Tensor
    """[B, R, M], what the read heads read at the last step."""
    controller: ControllerState


class PlainState(NamedTuple):
    """The whole state of a controller that works alone."""

    controller: ControllerState


State = NTMState | DNCState | PlainState


def named_tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of the state under a flat name; the controller's begin with `controller_`."""
    named = {name: value for name, value in state._asdict().items() if name != "controller"}
    for prefix, layer in zip(_prefixes(state.controller), state.controller, strict=True):
        named |= {f"{prefix}_{name}": tensor for name, tensor in layer._asdict().items()}
    return named


def with_tensors(like: Any, named: dict[str, Tensor]) -> Any:
    """The inverse of `named_tensors`: a state with the structure of `like` and the tensors of `named`."""
    layers = zip(_prefixes(like.controller), like.controller, strict=True)
    controller = tuple(
        type(layer)(*(named[f"{prefix}_{name}"] for name in layer._fields)) for prefix, layer in layers
    )
    others = {name: named[name] for name in like._fields if name != "controller"}
    return type(like)(**others, controller=controller)


def _prefixes(layers: ControllerState) -> list[str]:
    """One layer needs no number."""
    return ["controller"] if len(layers) == 1 else [f"controller_{i + 1}" for i in range(len(layers))]
