"""Requests: messages that name what they are to do, so that a repeat takes effect once."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

from ntm import _tracing
from ntm._routing import ROUTING_KEY
from ntm._steps import fill_inputs
from ntm.tensor import Array, to_message
from ntm.v1 import model_service_pb2, session_service_pb2, tensor_pb2


def get_model(name: str, version: int | None) -> model_service_pb2.GetModelRequest:
    """Asks for a model, by default its newest version."""
    return model_service_pb2.GetModelRequest(model_name=name, model_version=version)


def create_session(
    model_name: str, version: int | None, session_id: str | None, initial_state: Mapping[str, Array]
) -> session_service_pb2.CreateSessionRequest:
    """Asks for a session, named so that a repeat makes no second one."""
    return session_service_pb2.CreateSessionRequest(
        model_name=model_name,
        model_version=version,
        session_id=session_id or _new_id(),
        request_id=_new_id(),
        initial_state=[
            tensor_pb2.NamedTensor(name=name, value=to_message(value))
            for name, value in initial_state.items()
        ],
    )


def fork_session(
    source_session_id: str, at_step: int, session_id: str | None
) -> session_service_pb2.ForkSessionRequest:
    """Asks for a copy of a session, named so that a repeat makes no second one."""
    return session_service_pb2.ForkSessionRequest(
        source_session_id=source_session_id,
        at_step=at_step,
        session_id=session_id or _new_id(),
        request_id=_new_id(),
    )


def reset_session(session_id: str, at_step: int) -> session_service_pb2.ResetSessionRequest:
    """Asks for the initial state, at a step, so that a repeat changes nothing."""
    return session_service_pb2.ResetSessionRequest(session_id=session_id, at_step=at_step)


def step(
    session_id: str, first_step: int, inputs: Array, trace_state: Iterable[str] = ()
) -> session_service_pb2.StepRequest:
    """A numbered message for one session."""
    request = session_service_pb2.StepRequest(
        session_id=session_id, first_step=first_step, trace_state=trace_state
    )
    fill_inputs(request, inputs)
    return request


def import_session(snapshot: bytes, session_id: str | None) -> session_service_pb2.ImportSessionRequest:
    """Asks for a session made from a snapshot, named so that a repeat makes no second one."""
    return session_service_pb2.ImportSessionRequest(
        snapshot=snapshot, session_id=session_id or _new_id(), request_id=_new_id()
    )


def metadata(session_id: str) -> tuple[tuple[str, str], ...]:
    """What routers need to know: that the call may be sent again, and where the session lives, if it has one.

    And the application's trace, if there is one.
    """
    safe = (("ntm-retry-safe", "1"), *_tracing.context())
    return ((ROUTING_KEY, session_id), *safe) if session_id else safe


def _new_id() -> str:
    """128 random bits: an id that nobody else has."""
    return secrets.token_hex(16)
