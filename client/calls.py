"""Calls: what the synchronous and the asynchronous client have in common, all that does no I/O.

Requests are built and answers read here; `sync.py` and `aio.py` send them. When a call may be repeated, and
for how long, is decided here too.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np
import numpy.typing as npt
import tenacity

from client.errors import ClientError, from_status
from ntm.tensor import Array, numpy_dtype, to_array, to_message
from ntm.v1 import model_pb2, model_service_pb2, session_pb2, session_service_pb2

# The server keeps its answers below its own limit, so the client sets none.
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

# What the server sets aside in a message for all but tensors.
_ENVELOPE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Trace:
    """Outputs of a run, with state as it was after each step."""

    outputs: Array
    """[T, ...output shape]."""
    state: dict[str, Array]
    """By name, [T, ...state shape] each."""


@dataclass(frozen=True)
class BatchResult:
    """Outputs of many sessions."""

    outputs: Array
    """[S, T, ...output shape]; the rows of sessions that failed are zero."""
    errors: dict[int, ClientError]
    """Why sessions failed, by index."""


class Model:
    """What the client knows of a model: the shapes and limits that its calls need."""

    def __init__(self, info: model_service_pb2.GetModelResponse) -> None:
        self.info = info
        self.spec: model_pb2.ModelSpec = info.spec
        self.input_dtype = numpy_dtype(info.spec.input.dtype)
        self.output_dtype = numpy_dtype(info.spec.output.dtype)

    def inputs(self, values: npt.ArrayLike, num_leading_axes: int = 1) -> Array:
        """Values as an array of the input's dtype, [T, ...input shape] with one leading axis.

        Raises:
            ValueError: they have another shape, a type of another kind, or integers that do not fit.
        """
        array = np.asarray(values)
        shape = tuple(self.spec.input.shape)
        if array.ndim != num_leading_axes + len(shape) or array.shape[num_leading_axes:] != shape:
            leading = ["T"] if num_leading_axes == 1 else ["S", "T"]
            wanted = ", ".join([*leading, *map(str, shape)])
            raise ValueError(f"inputs have shape {array.shape}: send [{wanted}]")
        from_integers = array.dtype.kind in "bui" and self.input_dtype.kind == "f"
        if not from_integers and not np.can_cast(array.dtype, self.input_dtype, "same_kind"):
            raise ValueError(f"inputs are {array.dtype}: send {self.input_dtype}")
        converted = array.astype(self.input_dtype, copy=False)
        if self.input_dtype.kind in "iu" and not np.array_equal(converted, array):
            raise ValueError(f"inputs have values that do not fit in {self.input_dtype}")
        return converted

    def chunks(self, inputs: Array) -> Iterator[Array]:
        """Inputs cut into as few messages as the server's limits allow."""
        limits = self.info.limits
        input_bytes = math.prod(self.spec.input.shape) * self.input_dtype.itemsize
        output_bytes = math.prod(self.spec.output.shape) * self.output_dtype.itemsize
        fitting = (limits.max_message_bytes - _ENVELOPE_BYTES) // max(input_bytes, output_bytes)
        size = max(1, min(limits.max_steps_per_message, fitting))
        for start in range(0, len(inputs), size):
            yield inputs[start : start + size]

    def join(self, outputs: Sequence[Array]) -> Array:
        """The outputs of several messages as one array, [T, ...output shape]."""
        empty = np.empty((0, *self.spec.output.shape), self.output_dtype)
        return np.concatenate([empty, *outputs])

    def state_names(self, names: Sequence[str]) -> list[str]:
        """The names asked for, or all."""
        return list(names) or [state.input_name for state in self.spec.states]


def new_id() -> str:
    """128 random bits: an id that nobody else has."""
    return secrets.token_hex(16)


def metadata(session_id: str) -> tuple[tuple[str, str], ...]:
    """What routers need to know: that the call may be sent again, and where the session lives, if it has one."""
    safe = (("ntm-retry-safe", "1"),)
    return (("ntm-routing-key", session_id), *safe) if session_id else safe


def retrying(retry_for_s: float) -> dict[str, Any]:
    """tenacity's settings: repeat what was unavailable, with growing random pauses, for a bounded time."""
    return {
        "retry": tenacity.retry_if_exception(_is_unavailable),
        "wait": tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
        "stop": tenacity.stop_after_delay(retry_for_s),
        "reraise": True,
    }


def _is_unavailable(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE


def model_request(name: str, version: int | None) -> model_service_pb2.GetModelRequest:
    """Asks for a model, by default its newest version."""
    return model_service_pb2.GetModelRequest(model_name=name, model_version=version)


def create_request(
    model_name: str, version: int | None, session_id: str | None
) -> session_service_pb2.CreateSessionRequest:
    """Asks for a session, named so that a repeat makes no second one."""
    return session_service_pb2.CreateSessionRequest(
        model_name=model_name,
        model_version=version,
        session_id=session_id or new_id(),
        request_id=new_id(),
    )


def fork_request(
    source_session_id: str, at_step: int, session_id: str | None
) -> session_service_pb2.ForkSessionRequest:
    """Asks for a copy of a session, named so that a repeat makes no second one."""
    return session_service_pb2.ForkSessionRequest(
        source_session_id=source_session_id,
        at_step=at_step,
        session_id=session_id or new_id(),
        request_id=new_id(),
    )


def reset_request(session_id: str, at_step: int) -> session_service_pb2.ResetSessionRequest:
    """Asks for the initial state, at a step, so that a repeat changes nothing."""
    return session_service_pb2.ResetSessionRequest(session_id=session_id, at_step=at_step)


def step_request(
    session_id: str, first_step: int, inputs: Array, include_state: Iterable[str] = ()
) -> session_service_pb2.StepRequest:
    """A numbered message for one session."""
    return session_service_pb2.StepRequest(
        session_id=session_id,
        first_step=first_step,
        inputs=to_message(inputs),
        include_state=include_state,
    )


class Stepping(Protocol):
    """What a batch needs of a session, synchronous or not."""

    model: Model
    session_id: str
    next_step: int


@contextmanager
def all_or_back(session: Stepping) -> Iterator[None]:
    """Put the step counter back when one of a call's messages fails, so that the call can be repeated as it was."""
    start = session.next_step
    try:
        yield
    except BaseException:
        session.next_step = start
        raise


def batch_request(
    sessions: Sequence[Stepping], inputs: npt.ArrayLike
) -> session_service_pb2.BatchStepRequest:
    """Numbered messages for many sessions; inputs [S, T, ...input shape]."""
    if not sessions:
        raise ValueError("send at least one session")
    return session_service_pb2.BatchStepRequest(
        session_ids=[session.session_id for session in sessions],
        first_steps=[session.next_step for session in sessions],
        inputs=to_message(sessions[0].model.inputs(inputs, num_leading_axes=2)),
    )


def batch_result(
    response: session_service_pb2.BatchStepResponse,
    request: session_service_pb2.BatchStepRequest,
    sessions: Sequence[Stepping],
) -> BatchResult:
    """Read the answer to a batch, and move the sessions that ran to their next step."""
    errors = {
        error.index: from_status(error.code, error.reason, error.message, dict(error.metadata))
        for error in response.errors
    }
    for index, session in enumerate(sessions):
        if index not in errors:
            session.next_step = response.next_steps[index]
    if response.HasField("outputs"):
        return BatchResult(to_array(response.outputs), errors)
    model = sessions[0].model
    shape = (*request.inputs.shape[:2], *model.spec.output.shape)
    return BatchResult(np.zeros(shape, model.output_dtype), errors)


def state_arrays(tensors: Iterable[session_pb2.StateTensor]) -> dict[str, Array]:
    """State tensors by name."""
    return {tensor.name: to_array(tensor.value) for tensor in tensors}


def trace(answers: Sequence[session_service_pb2.StepResponse], model: Model, names: Iterable[str]) -> Trace:
    """The answers to single steps as one run."""
    states = [state_arrays(answer.state) for answer in answers]
    stacked = {name: np.stack([state[name] for state in states]) for name in names} if states else {}
    return Trace(model.join([to_array(answer.outputs) for answer in answers]), stacked)
