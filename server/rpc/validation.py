"""Requests: check what callers send, once, at the edge. What passes here is trusted from here on.

Every check names the field at fault and says what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntm.tensor import Array, TensorError, data_type, numpy_dtype, to_array, type_name
from ntm.v1 import model_pb2, session_service_pb2, tensor_pb2
from server.errors import InvalidInputError
from server.model.layout import Steps
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


@dataclass(frozen=True)
class GivenSteps:
    """What a request gives for steps, before it is held against a model."""

    arrays: dict[str, Array]
    """By name; the name is "" for the input of a model that has one."""
    resets: npt.NDArray[np.bool_] | None


def step_inputs(request: session_service_pb2.StepRequest, model: StepModel, limits: RequestLimits) -> Steps:
    """The steps [T] of one session."""
    # One step of one input, as most are, takes 2.5 µs here and 7.8 below, where it is said what is wrong.
    layout, plain = model.inputs, request.inputs
    if (
        len(layout.names) == 1
        and plain.dtype == model.spec.inputs[0].dtype
        and plain.dtype != tensor_pb2.DATA_TYPE_BOOL
        and plain.shape == layout.single_shape
        and not request.named_inputs
        and not request.HasField("resets")
        and (step := layout.one_step(plain.raw)) is not None
    ):
        return step
    given = _given(request)
    for name, array in given.arrays.items():
        if array.ndim == 0:
            tensor = model.spec.inputs[0]
            raise InvalidInputError(
                _field(name, "shape"),
                f"[] must be [T, {_join(tensor.shape)}]: T steps of input {tensor.name!r}",
            )
    num_steps = len(next(iter(given.arrays.values())))
    _check_against(given, model, "T", (num_steps,))
    _check_steps(num_steps, limits)
    return _packed(given, model)


def initial_state(tensors: Sequence[tensor_pb2.NamedTensor]) -> dict[str, Array]:
    """Values that a session is to begin from, by name; they are held against its model when that is known."""
    arrays: dict[str, Array] = {}
    for named in tensors:
        if named.name in arrays:
            raise InvalidInputError("initial_state", f"state {named.name!r} stands there twice")
        arrays[named.name] = _array(f"initial_state[{named.name}]", named.value)
    return arrays


def check_num_sessions(num_sessions: int, limits: RequestLimits) -> None:
    """That a batch has some sessions, and not too many."""
    if not 1 <= num_sessions <= limits.max_sessions_per_batch:
        raise InvalidInputError(
            "session_ids", f"{num_sessions} sessions in one batch: send 1 to {limits.max_sessions_per_batch}"
        )


def batch_inputs(
    request: session_service_pb2.BatchStepRequest, num_sessions: int, limits: RequestLimits
) -> GivenSteps:
    """The inputs of S sessions, [S, T, ...] each; `batch_steps` holds them against the sessions' model."""
    given = _given(request)
    for name, array in given.arrays.items():
        if array.ndim < 2 or array.shape[0] != num_sessions:
            raise InvalidInputError(
                _field(name, "shape"),
                f"{list(array.shape)} must be [{num_sessions}, T, ...]: T steps for each of {num_sessions} session_ids",
            )
        _check_steps(array.shape[1], limits)
        _check_finite(name, array)
    return given


def batch_steps(given: GivenSteps, model: StepModel, limits: RequestLimits) -> Steps:
    """The steps [S, T] of a batch, which fit the model of its sessions, and whose answer fits a message."""
    num_sessions, num_steps = next(iter(given.arrays.values())).shape[:2]
    _check_against(given, model, "S, T", (num_sessions, num_steps))
    check_answer_size("inputs.shape", num_sessions * num_steps, [], model, limits, num_items=num_sessions)
    return _packed(given, model)


def check_alike(field: str, spec: model_pb2.ModelSpec, others: model_pb2.ModelSpec) -> None:
    """That a session's model takes and gives what the models of the other sessions of its batch do."""
    for kind, mine, theirs in (
        ("takes", spec.inputs, others.inputs),
        ("gives", spec.outputs, others.outputs),
    ):
        if _signature(mine) != _signature(theirs):
            raise InvalidInputError(
                field,
                f"this session's model {kind} {_said(mine)}, the others {_said(theirs)}: send it in a batch of its own",
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
    traced: Sequence[str] = (),
) -> None:
    """That the answer will fit in a message, before anything is run for it; `field` is what can be made less."""
    output_bytes = num_steps * model.output_bytes
    state_bytes = 0
    if state_names or traced:
        state_bytes = sum(
            math.prod(state.shape)
            * numpy_dtype(state.dtype).itemsize
            * ((state.input_name in state_names) + num_steps * (state.input_name in traced))
            for state in model.spec.states
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


def _given(request: session_service_pb2.StepRequest | session_service_pb2.BatchStepRequest) -> GivenSteps:
    if request.named_inputs and request.HasField("inputs"):
        raise InvalidInputError(
            "named_inputs", "send either inputs, for a model of one input, or named_inputs"
        )
    arrays: dict[str, Array] = {}
    if not request.named_inputs:
        arrays[""] = _array("inputs", request.inputs)
    for named in request.named_inputs:
        if not named.name or named.name in arrays:
            raise InvalidInputError(
                "named_inputs", f"input {named.name!r} stands there twice, or has no name"
            )
        arrays[named.name] = _array(f"named_inputs[{named.name}]", named.value)
    resets = _array("resets", request.resets) if request.HasField("resets") else None
    if resets is not None and resets.dtype != np.bool_:
        raise InvalidInputError("resets.dtype", f"{type_name(request.resets.dtype)} must be BOOL")
    return GivenSteps(arrays, resets)


def _check_against(given: GivenSteps, model: StepModel, axes: str, leading: tuple[int, ...]) -> None:
    """That inputs are a model's, each with the same leading axes, and that resets have these."""
    arrays, tensors = given.arrays, model.spec.inputs
    if "" in arrays and len(tensors) > 1:
        raise InvalidInputError("inputs", f"this model takes {_said(tensors)}: send named_inputs")
    names = [tensor.name for tensor in tensors]
    if "" not in arrays and set(arrays) != set(names):
        missing, unknown = [n for n in names if n not in arrays], [n for n in arrays if n not in names]
        problems = [f"input {name!r} is missing" for name in missing]
        problems += [f"{name!r} is no input of a step" for name in unknown]
        raise InvalidInputError("named_inputs", f"{'; '.join(problems)}: the model takes {_said(tensors)}")
    for tensor in tensors:
        name = "" if "" in arrays else tensor.name
        array = arrays[name]
        if array.dtype != numpy_dtype(tensor.dtype):
            raise InvalidInputError(
                _field(name, "dtype"),
                f"{type_name(data_type(array.dtype))} must be {type_name(tensor.dtype)}, the type of input "
                f"{tensor.name!r}",
            )
        if array.shape != (*leading, *tensor.shape):
            same = (
                ""
                if array.shape[len(leading) :] != tuple(tensor.shape)
                else ", as many as of the other inputs"
            )
            raise InvalidInputError(
                _field(name, "shape"),
                f"{list(array.shape)} must be [{', '.join([axes, *map(str, tensor.shape)])}]: T steps of input "
                f"{tensor.name!r}{same}",
            )
        if axes == "T":
            _check_finite(name, array)
    if given.resets is not None and given.resets.shape != leading:
        raise InvalidInputError(
            "resets.shape", f"{list(given.resets.shape)} must be {list(leading)}: one for each step, [{axes}]"
        )


def _packed(given: GivenSteps, model: StepModel) -> Steps:
    arrays = given.arrays
    return model.inputs.pack({model.inputs.names[0]: arrays[""]} if "" in arrays else arrays, given.resets)


def _array(field: str, tensor: tensor_pb2.Tensor) -> Array:
    try:
        return to_array(tensor)
    except TensorError as error:
        raise InvalidInputError(f"{field}.{error.field}", str(error)) from error


def _check_steps(num_steps: int, limits: RequestLimits) -> None:
    if not 1 <= num_steps <= limits.max_steps_per_message:
        raise InvalidInputError(
            "inputs.shape", f"{num_steps} steps in one message: send 1 to {limits.max_steps_per_message}"
        )


def _check_finite(name: str, array: Array) -> None:
    if array.dtype.kind == "f" and np.count_nonzero(np.isfinite(array)) != array.size:
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InvalidInputError(
            _field(name, "raw"), f"the value at {list(where)} is {array[where]}: all must be finite"
        )


def _field(name: str, part: str) -> str:
    return f"named_inputs[{name}].{part}" if name else f"inputs.{part}"


def _signature(tensors: Sequence[model_pb2.TensorSpec]) -> list[object]:
    """What inputs or outputs must have in common to stand in one message; names only where there are several."""
    return [
        (tensor.dtype, tuple(tensor.shape), tensor.name if len(tensors) > 1 else "") for tensor in tensors
    ]


def _said(tensors: Sequence[model_pb2.TensorSpec]) -> str:
    if len(tensors) == 1:
        return f"{type_name(tensors[0].dtype)} [{_join(tensors[0].shape)}]"
    return ", ".join(f"{t.name} {type_name(t.dtype)} [{_join(t.shape)}]" for t in tensors)


def _join(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
