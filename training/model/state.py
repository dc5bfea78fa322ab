"""State: everything that passes from one step to the next, and by what name.

`cell.py` makes and consumes it. The names given here are the names of the exported graph's inputs, so they
are what a caller of the server sees.

Shapes: B batch, N memory rows, M row width, R read heads, W write heads, C controller size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LSTMState(NamedTuple):
    """What an LSTM controller carries along."""

    hidden: Tensor
    """[B, C], in (-1, 1)."""
    cell: Tensor
    """[B, C]."""


class Stateless(NamedTuple):
    """A feed-forward controller carries nothing along."""


ControllerState = LSTMState | Stateless


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


def named_tensors(state: NTMState) -> dict[str, Tensor]:
    """Every tensor of the state under a flat name; the controller's begin with `controller_`."""
    return {
        "memory": state.memory,
        "read_weightings": state.read_weightings,
        "write_weightings": state.write_weightings,
        "read_vectors": state.read_vectors,
        **{f"controller_{name}": tensor for name, tensor in state.controller._asdict().items()},
    }


def with_tensors(like: NTMState, named: dict[str, Tensor]) -> NTMState:
    """The inverse of `named_tensors`: a state with the structure of `like` and the tensors of `named`."""
    kind = type(like.controller)
    return NTMState(
        memory=named["memory"],
        read_weightings=named["read_weightings"],
        write_weightings=named["write_weightings"],
        read_vectors=named["read_vectors"],
        controller=kind(*(named[f"controller_{name}"] for name in kind._fields)),
    )
