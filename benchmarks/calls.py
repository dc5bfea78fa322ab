"""Calls: the messages of this project's own API, as lanes for `load.py`.

Every message names its `first_step`, as a client's do; so a session must stand at the lane's `first_step` when a
load begins. Inputs are random bits.

Shapes: S sessions, T steps of each of them in one message, I input size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from google.protobuf.message import Message

from benchmarks.load import Call, LoadError, LoadReport, wide_varint
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2, tensor_pb2

STEP = "/ntm.v1.SessionService/Step"
STREAM_STEPS = "/ntm.v1.SessionService/StreamSteps"
BATCH_STEP = "/ntm.v1.SessionService/BatchStep"

# A step index that takes 5 bytes as it is, and stands nowhere else in a message.
_MARK = 0x5_A5A5_A5A5


def step_calls(
    session_ids: Sequence[str], num_steps: int, input_size: int, first_step: int = 0
) -> list[Call]:
    """A lane of Step messages for each session; inputs [T, I]."""
    return [
        _call(STEP, _step_request(session_id, num_steps, input_size), 1, num_steps, first_step)
        for session_id in session_ids
    ]


def stream_calls(
    session_ids: Sequence[str], num_steps: int, input_size: int, first_step: int = 0
) -> list[Call]:
    """A lane of StreamSteps messages for each session; inputs [T, I]."""
    requests = [
        session_service_pb2.StreamStepsRequest(step=_step_request(session_id, num_steps, input_size))
        for session_id in session_ids
    ]
    return [_call(STREAM_STEPS, request, 1, num_steps, first_step) for request in requests]


def batch_call(session_ids: Sequence[str], num_steps: int, input_size: int, first_step: int = 0) -> Call:
    """A lane of BatchStep messages for all the sessions; inputs [S, T, I]."""
    request = session_service_pb2.BatchStepRequest(
        session_ids=session_ids,
        first_steps=[_MARK] * len(session_ids),
        inputs=_bits(len(session_ids), num_steps, input_size),
    )
    return _call(BATCH_STEP, request, len(session_ids), num_steps, first_step)


def check_batches(report: LoadReport) -> None:
    """Look for sessions that failed within a BatchStep, which as a whole is OK.

    The last answers tell of all: after one failure the session's counter no longer fits the messages.

    Raises:
        LoadError: there is one.
    """
    for answer in report.last_answers:
        for error in session_service_pb2.BatchStepResponse.FromString(answer).errors:
            raise LoadError(
                f"session {error.index} of a batch failed, {error.reason}: {error.message}", error.code
            )


def _step_request(session_id: str, num_steps: int, input_size: int) -> session_service_pb2.StepRequest:
    return session_service_pb2.StepRequest(
        session_id=session_id, first_step=_MARK, inputs=_bits(num_steps, input_size)
    )


def _bits(*shape: int) -> tensor_pb2.Tensor:
    return to_message(np.random.default_rng(0).integers(0, 2, shape).astype(np.float32))


def _call(method: str, request: Message, num_sessions: int, num_steps: int, first_step: int) -> Call:
    before, after = request.SerializeToString().split(wide_varint(_MARK) * num_sessions)
    return Call(method, before, after, num_sessions, num_steps, first_step)
