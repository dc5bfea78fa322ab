"""Scripts: the messages of a sequence of single steps of the model `copy`, for `sequence_load.py`, by either protocol.

Inputs are random bits, the same for every sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from benchmarks.calls import STEP, STREAM_STEPS
from benchmarks.load import Kind, wide_varint
from benchmarks.peers import triton
from benchmarks.peers.naive import INPUT_SIZE
from benchmarks.sequence_load import Script, ScriptMessage
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb

NUM_STEPS = 50

_CREATE, _DELETE = "/ntm.v1.SessionService/CreateSession", "/ntm.v1.SessionService/DeleteSession"
# Ids that stand nowhere else in a message, and take as many bytes as every other.
_TEXT_MARK = "m" * 32
_NUMBER_MARK = 0x5_A5A5_A5A5


def own_script(kind: Kind) -> Script:
    """By the project's own API: CreateSession, 50 steps with their numbers, DeleteSession."""
    create = pb.CreateSessionRequest(model_name="copy", session_id=_TEXT_MARK)
    messages = [_text_message(_CREATE, create)]
    for first_step, inputs in enumerate(_inputs()):
        step = pb.StepRequest(session_id=_TEXT_MARK, first_step=first_step, inputs=to_message(inputs[None]))
        if kind == "unary":
            messages.append(_text_message(STEP, step))
        else:
            messages.append(_text_message(STREAM_STEPS, pb.StreamStepsRequest(step=step), is_streamed=True))
    delete = pb.DeleteSessionRequest(session_id=_TEXT_MARK, allow_missing=True)
    return Script((*messages, _text_message(_DELETE, delete)), NUM_STEPS, "text")


def inference_script(kind: Kind) -> Script:
    """By the open inference protocol: 50 steps, of which the first has START and the last END."""
    messages = []
    for number, inputs in enumerate(_inputs()):
        message = triton.step_message(_NUMBER_MARK, inputs, start=number == 0, end=number == NUM_STEPS - 1)
        method = triton.UNARY_METHOD if kind == "unary" else triton.STREAM_METHOD
        pieces = tuple(message.split(wide_varint(_NUMBER_MARK)))
        messages.append(ScriptMessage(method, kind == "stream", pieces))
    return Script(tuple(messages), NUM_STEPS, "varint", tells_errors_in_band=kind == "stream")


def _inputs() -> npt.NDArray[np.float32]:
    """[steps, input size] random bits."""
    return np.random.default_rng(0).integers(0, 2, (NUM_STEPS, INPUT_SIZE)).astype(np.float32)


def _text_message(method: str, request: Message, is_streamed: bool = False) -> ScriptMessage:
    pieces = request.SerializeToString().split(_TEXT_MARK.encode())
    return ScriptMessage(method, is_streamed, tuple(pieces))
