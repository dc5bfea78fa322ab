"""Results: what calls give to their caller, made from the server's answers.

Shapes: T steps of one message or chunk, S sessions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ntm._errors import ClientError
from ntm._model import Model
from ntm._steps import Outputs, inputs_of, outputs_of, shown
from ntm.tensor import Array, to_array
from ntm.v1 import session_pb2, session_service_pb2


@dataclass(frozen=True)
class Trace:
    """Outputs of a run, with state as it was after each step."""

    outputs: Outputs
    """[T, ...output shape], by name where there are several."""
    state: dict[str, Array]
    """By name, [T, ...state shape] each."""


@dataclass(frozen=True)
class Watched:
    """What a watched session did: the steps of one message, or a reset; the first of all is the state it was in."""

    first_step: int
    """Index of the first of the steps."""
    inputs: Outputs | None
    """[T, ...input shape], by name where there are several; None where there are no steps."""
    outputs: Outputs | None
    """[T, ...output shape], likewise; None where there are no steps."""
    next_step: int
    """Index of the step after the last."""
    state: dict[str, Array]
    """After the last step, by name; empty for a reset, after which it is the initial one."""
    num_lost_messages: int
    """How many messages came just before this one and were not sent, since this watcher was behind."""
    is_reset: bool
    """The session was put back to its initial state."""
    resets: Array | None
    """[T], which of the steps began from the initial state; None where none did."""


@dataclass(frozen=True)
class BatchResult:
    """Outputs of many sessions."""

    outputs: Outputs
    """[S, T, ...output shape], by name where there are several; the rows of sessions that failed are zero."""
    errors: dict[int, ClientError]
    """Why sessions failed, by index."""


def watched(answer: session_service_pb2.WatchSessionResponse) -> Watched:
    """One answer of a watch."""
    has_steps = answer.HasField("inputs") or bool(answer.named_inputs)
    return Watched(
        answer.first_step,
        shown(inputs_of(answer)) if has_steps else None,
        shown(outputs_of(answer.step)) if has_steps else None,
        answer.step.next_step,
        state_arrays(answer.step.state),
        answer.num_lost_messages,
        answer.is_reset,
        to_array(answer.resets) if answer.HasField("resets") else None,
    )


def state_arrays(tensors: Iterable[session_pb2.StateTensor]) -> dict[str, Array]:
    """State tensors by name."""
    return {tensor.name: to_array(tensor.value) for tensor in tensors}


def trace_of(
    answers: Sequence[session_service_pb2.StepResponse], model: Model, names: Iterable[str]
) -> Trace:
    """The answers to messages as one run."""
    states = [state_arrays(answer.trace) for answer in answers]
    stacked = {name: np.concatenate([state[name] for state in states]) for name in names} if states else {}
    return Trace(shown(model.join([outputs_of(answer) for answer in answers])), stacked)
