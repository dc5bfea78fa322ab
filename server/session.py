"""Session: what the server knows of one session while it is in memory, and the calls that stand in its line.

Data only: `lines.py` serves the calls, `steps.py` runs their messages, `residence.py` brings sessions into memory and
out again.

Shapes: S sessions of a batch, T steps of a message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ntm.tensor import Array
from server.engine import Message
from server.errors import ServingError
from server.history import History
from server.model_runner import INITIAL_SLOT
from server.records import About
from server.served_model import ServedModel
from server.store import Entry


@dataclass(eq=False, slots=True)
class Session:
    """A scratch memory and its history."""

    session_id: str
    request_id: str
    model: ServedModel
    about: About
    fence: int
    """Under which this replica may write it."""
    history: History
    last_use_s: float
    """Service time of its last call."""
    slot: int = INITIAL_SLOT
    calls: deque[Call | Group] = field(default_factory=deque)
    """Calls in order of arrival; the first is being served."""
    is_ready: bool = True
    """Its state is in its slot. Until then its calls wait."""
    is_leaving: bool = False
    """The last call in its line gives it to another replica; no more may enter."""
    loss: ServingError | None = None
    """Why it is here no more: what every call that is still in its line is told."""

    has_vacated: bool = False
    """Lost, and its slot and place given up."""

    @property
    def next_step(self) -> int:
        """Index of the next step."""
        return self.history.next_step

    @property
    def has_just_failed(self) -> bool:
        """Whether the last message failed, so that a repeat of it is answered without running it."""
        failure = self.about.failure
        return failure is not None and failure.first_step == self.history.next_step

    def entry(
        self, about: About, next_step: int, last_use_s: float, end_time_s: float | None = None
    ) -> Entry:
        """What the store is to keep of it."""
        return Entry(
            self.session_id,
            self.model.model.name,
            self.request_id,
            next_step,
            last_use_s,
            about.encode(),
            end_time_s,
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to a message."""

    outputs: Array
    """[T, ...output shape]."""
    next_step: int
    state: dict[str, Array]
    """By name, without the batch axis and in the graph's axes; empty unless it was asked for."""


@dataclass(eq=False, slots=True)
class Call:
    """One call on one session, waiting or being served."""

    session: Session
    begin: Callable[[Call], None]
    """Called when its turn has come; ends the call, or sees to it that it is ended later."""
    future: asyncio.Future[Any]
    """What its caller waits for; several calls can share one."""
    settle: Callable[[Any], None]
    """Called with the result, or the exception, unless the caller has left."""
    follows: Call | None = None
    """The call before it on its stream: if that one fails, this one is not begun."""
    is_begun: bool = False
    message: Message | None = None
    """What it has in the engine's line."""
    has_failed: bool = False


@dataclass(eq=False, slots=True)
class BatchResult:
    """What became of the steps of several sessions."""

    outputs: Array | None
    """[S, T, ...output shape], zeros where a session failed; None if all did."""
    next_steps: list[int]
    """0 where a session failed."""
    errors: dict[int, BaseException]
    """By index."""


class Batch:
    """What the caller of several sessions' steps waits for: what became of each, when all have ended."""

    def __init__(self, num_sessions: int, num_steps: int) -> None:
        self.future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
        self.calls: list[Call | Group] = []
        self._size = (num_sessions, num_steps)
        self._result = BatchResult(None, [0] * num_sessions, {})
        self._num_left = num_sessions

    def call(self, session: Session, begin: Callable[[Call], None], index: int) -> Call:
        """A call for one of the sessions."""
        call = Call(session, begin, self.future, partial(self.settle, index))
        self.calls.append(call)
        return call

    def settle(self, index: int, result: object) -> None:
        """Note what became of one session's steps."""
        if isinstance(result, StepResult):
            self._outputs_like(result.outputs)[index] = result.outputs
            self._result.next_steps[index] = result.next_step
        else:
            assert isinstance(result, BaseException)
            self._result.errors[index] = result
        self._end(1)

    def settle_group(self, group: Group, outputs: Array, errors: Mapping[int, ServingError]) -> None:
        """Note what became of a group's steps: outputs [its sessions, T, ...output shape], and errors by row."""
        if not errors and len(group.indices) == self._size[0]:
            self._result.outputs = outputs
            self._result.next_steps = [session.history.next_step for session in group.sessions]
            return self._end(len(group.indices))
        for row, (index, session) in enumerate(zip(group.indices, group.sessions, strict=True)):
            if row in errors:
                self._result.errors[index] = errors[row]
            else:
                self._outputs_like(outputs[row])[index] = outputs[row]
                self._result.next_steps[index] = session.next_step
        return self._end(len(group.indices))

    def _outputs_like(self, outputs: Array) -> Array:
        if self._result.outputs is None:
            self._result.outputs = np.zeros((*self._size, *outputs.shape[1:]), outputs.dtype)
        return self._result.outputs

    def _end(self, num_sessions: int) -> None:
        self._num_left -= num_sessions
        if not self._num_left:
            self.calls.clear()  # they know the batch, and would stay with it until the collector comes
            if not self.future.done():
                self.future.set_result(self._result)


@dataclass(eq=False, slots=True)
class Group:
    """Sessions of a batch that are served together, in one message, since nothing else is to be served before.

    It stands in the line of each of them: alone, or behind the same other group.
    """

    batch: Batch
    served: ServedModel
    indices: list[int]
    """Where the sessions stand in the batch."""
    sessions: list[Session]
    inputs: Array
    """[sessions, T, ...input shape]."""
    first_steps: Sequence[int]
    """As its caller says, or empty."""
    begin: Callable[[Group], None]
    """Called when it is the turn of all its sessions."""
    waiting: set[Session] = field(default_factory=set)
    """Sessions whose turn has not come."""
    message: Message | None = None

    def keep(self, rows: Sequence[int]) -> None:
        """Go on without the sessions in the other rows."""
        self.sessions = [self.sessions[row] for row in rows]
        self.indices = [self.indices[row] for row in rows]
        self.inputs = self.inputs[list(rows)]
        self.first_steps = [self.first_steps[row] for row in rows] if self.first_steps else ()
