"""Requests: check what callers send, once, at the edge. What passes here is trusted from here on.

Every check names the field at fault and says what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntm.tensor import Array, TensorError, numpy_dtype, to_array, type_name
from ntm.v1 import model_pb2, tensor_pb2
from server.errors import InvalidInputError
from server.model.spec import StepModel

# What a message may weigh beside its tensors: ids, counters, names.
ENVELOPE_BYTES = 64 * 1024
# What one item of a batch may weigh in the answer beside its outputs: an error, with its text cut by `status.py`.
ITEM_BYTES = 1024

_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")


@dataclass(frozen=True)
class RequestLimits:
    """What one message may ask for."""

    max_steps_per_message: int
    max_unanswered_steps: int
    """On one stream: no more than a session keeps answers for."""
    max_sessions_per_batch: int
    max_message_bytes: int


def check_id(field: str, value: str, may_be_empty: bool = False) -> str:
    """An id that is well formed, or empty where that is allowed."""
    if not _ID.fullmatch(value) and not (may_be_empty and not value):
        raise InvalidInputError(
            field,
            f"{value[:140]!r} is not an id: use 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', '~' and '-'",
        )
    return value


def step_inputs(tensor: tensor_pb2.Tensor, model: StepModel, limits: RequestLimits) -> Array:
    """The inputs of one session, [T, ...input shape]."""
    array, spec = _array(tensor), model.spec.inputs[0]
    if array.dtype != model.no_inputs.dtype:
        raise InvalidInputError(
            "inputs.dtype",
            f"{type_name(tensor.dtype)} must be {type_name(spec.dtype)}, the type of input {spec.name!r}",
        )
    if array.shape[1:] != model.no_inputs.shape[1:] or array.ndim == 0:
        raise InvalidInputError(
            "inputs.shape",
            f"{list(array.shape)} must be [T, {_join(spec.shape)}]: T steps of input {spec.name!r}",
        )
    _check_steps(array.shape[0], limits)
    _check_finite(array)
    return array


def check_num_sessions(num_sessions: int, limits: RequestLimits) -> None:
    """That a batch has some sessions, and not too many."""
    if not 1 <= num_sessions <= limits.max_sessions_per_batch:
        raise InvalidInputError(
            "session_ids", f"{num_sessions} sessions in one batch: send 1 to {limits.max_sessions_per_batch}"
        )


def batch_inputs(tensor: tensor_pb2.Tensor, num_sessions: int, limits: RequestLimits) -> Array:
    """The inputs of S sessions, [S, T, ...input shape]; `check_fits` holds them against each session's model."""
    array = _array(tensor)
    if array.ndim < 2 or array.shape[0] != num_sessions:
        raise InvalidInputError(
            "inputs.shape",
            f"{list(array.shape)} must be [{num_sessions}, T, ...]: T steps for each of {num_sessions} session_ids",
        )
    _check_steps(array.shape[1], limits)
    _check_finite(array)
    return array


def check_batch_fits(inputs: Array, model: StepModel, limits: RequestLimits) -> None:
    """That the inputs [S, T, ...] of a batch fit the model of its sessions, and the answer a message."""
    num_sessions, num_steps = inputs.shape[:2]
    spec = model.spec
    if inputs.dtype != model.no_inputs.dtype:
        raise InvalidInputError(
            "inputs.dtype", f"the sessions' model takes {type_name(spec.inputs[0].dtype)}"
        )
    if inputs.shape[2:] != model.no_inputs.shape[1:]:
        raise InvalidInputError(
            "inputs.shape",
            f"{list(inputs.shape)} must be [S, T, {_join(spec.inputs[0].shape)}]: "
            f"T steps of input {spec.inputs[0].name!r}",
        )
    check_answer_size("inputs.shape", num_sessions * num_steps, [], model, limits, num_items=num_sessions)


def check_alike(field: str, spec: model_pb2.ModelSpec, others: model_pb2.ModelSpec) -> None:
    """That a session's model takes and gives what the models of the other sessions of its batch do."""
    for kind, mine, theirs in (
        ("takes", spec.inputs[0], others.inputs[0]),
        ("gives", spec.outputs[0], others.outputs[0]),
    ):
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            raise InvalidInputError(
                field,
                f"this session's model {kind} {type_name(mine.dtype)} [{_join(mine.shape)}], the others "
                f"{type_name(theirs.dtype)} [{_join(theirs.shape)}]: send it in a batch of its own",
            )


def check_state_names(field: str, names: Sequence[str], spec: model_pb2.ModelSpec) -> list[str]:
    """Names of state tensors, none twice."""
    if not names:
        return []
    known = [state.input_name for state in spec.states]
    if len(names) > len(known):
        raise InvalidInputError(
            field, f"{len(names)} names: this model has {len(known)} states, each wanted once"
        )
    for name in names:
        if name not in known:
            raise InvalidInputError(
                field, f"{name!r} is not a state of this model: it has {', '.join(known)}"
            )
    if len(set(names)) != len(names):
        raise InvalidInputError(field, "a name stands twice")
    return list(names)


def check_answer_size(
    field: str,
    num_steps: int,
    state_names: Sequence[str],
    model: StepModel,
    limits: RequestLimits,
    num_items: int = 0,
) -> None:
    """That the answer will fit in a message, before anything is run for it; `field` is what can be made less."""
    output_bytes = num_steps * model.output_bytes
    state_bytes = 0
    if state_names:
        state_bytes = sum(
            math.prod(state.shape) * numpy_dtype(state.dtype).itemsize
            for state in model.spec.states
            if state.input_name in state_names
        )
    other_bytes = ENVELOPE_BYTES + num_items * ITEM_BYTES
    if output_bytes + state_bytes + other_bytes > limits.max_message_bytes:
        raise InvalidInputError(
            field,
            f"the answer would take {output_bytes} bytes of outputs and {state_bytes} of state, more than a "
            f"message may have ({limits.max_message_bytes}, {other_bytes} of them for the rest): "
            "ask for less at a time, or raise --max-message-bytes",
        )


def check_message_bytes(num_bytes: int, limits: RequestLimits) -> None:
    """That a request is not too large; the transport itself refuses only what is far too large."""
    if num_bytes > limits.max_message_bytes:
        raise InvalidInputError(
            "inputs", f"the message has {num_bytes} bytes: send at most {limits.max_message_bytes} at a time"
        )


def _array(tensor: tensor_pb2.Tensor) -> Array:
    try:
        return to_array(tensor)
    except TensorError as error:
        raise InvalidInputError(f"inputs.{error.field}", str(error)) from error


def _check_steps(num_steps: int, limits: RequestLimits) -> None:
    if not 1 <= num_steps <= limits.max_steps_per_message:
        raise InvalidInputError(
            "inputs.shape", f"{num_steps} steps in one message: send 1 to {limits.max_steps_per_message}"
        )


def _check_finite(array: Array) -> None:
    if np.count_nonzero(np.isfinite(array)) != array.size:
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InvalidInputError(
            "inputs.raw", f"the value at {list(where)} is {array[where]}: all must be finite"
        )


def _join(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
