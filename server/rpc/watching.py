"""Watching, on the wire: a session's messages as a stream of answers.

`sessions/watching.py` decides what a watcher gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from ntm.tensor import Array, to_message
from ntm.v1 import session_pb2, session_service_pb2
from server.model.spec import to_api
from server.rpc.tensors import fill_inputs, fill_outputs
from server.sessions.manager import SessionManager
from server.sessions.session import Session

_Context = grpc.aio.ServicerContext[Any, Any]


async def watch(
    sessions: SessionManager,
    session: Session,
    names: Sequence[str],
    max_message_bytes: int,
    context: _Context,
) -> None:
    """Write what happens in a session, from its state of now on, until it ends or the caller leaves.

    What would not fit into an answer is counted among what is lost.

    Raises:
        ServingError: why there is no more of it here.
    """
    with sessions.watching.watch(session.session_id, bool(names)) as watcher:
        present_step, state = await sessions.state(session)
        begun = session_service_pb2.WatchSessionResponse(first_step=present_step)
        begun.step.next_step = present_step
        begun.step.state.extend(state_messages(session, names, state))
        await context.write(begun)
        num_too_large = 0
        while True:
            frame, num_lost = await watcher.next()
            if frame.next_step <= present_step and frame.inputs is not None:
                continue  # it is in the state that was sent first
            answer = session_service_pb2.WatchSessionResponse(
                first_step=frame.first_step,
                num_lost_messages=num_lost + num_too_large,
                is_reset=frame.inputs is None,
            )
            answer.step.next_step = frame.next_step
            answer.step.approximate = session.metadata.is_approximate
            if frame.inputs is not None and frame.outputs is not None:
                model = session.model.model
                fill_inputs(answer, frame.inputs, model)
                fill_outputs(answer.step, frame.outputs, model)
                answer.step.state.extend(state_messages(session, names, frame.state))
            if answer.ByteSize() > max_message_bytes:
                num_too_large = answer.num_lost_messages + 1
                continue
            num_too_large = 0
            await context.write(answer)


def state_messages(
    session: Session, names: Sequence[str], state: Mapping[str, Array]
) -> list[session_pb2.StateTensor]:
    """State tensors as the API shows them, in the order asked."""
    specs = {spec.input_name: spec for spec in session.model.model.spec.states}
    return [
        session_pb2.StateTensor(
            name=name, role=specs[name].role, value=to_message(to_api(specs[name], state[name]))
        )
        for name in names
    ]
