"""Requests: what stands in the queues of sessions, from `rpc/` to the device and back.

A StepRequest is T steps of S sessions of one model: a Step or a message of a stream has one, a BatchStep those of its
sessions that can go together. A Turn is anything else that is done with one session alone.

Shapes: S sessions, T steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ntm.tensor import Array
from server.engine.request import NO_SLOTS, EngineRequest
from server.model.layout import Steps
from server.runtime.runner import Rows
from server.sessions.session import Session

if TYPE_CHECKING:
    from server.sessions.served_model import ServedModel


TimesS = tuple[float, float]


class ReplyTo(Protocol):
    """Who waits for the answer to requests."""

    def reply(self, request: StepRequest) -> None:
        """Take the answer: results and errors by session stand in the request. Must not block."""

    def add(self, request: StepRequest) -> None:
        """Some of a request's sessions go on in one of their own."""


class StepRequest(EngineRequest):
    """Steps of some sessions: checked, admitted, queued, run, committed, answered."""

    __slots__ = (
        "_indices",
        "caller_inputs",
        "caller_steps",
        "commit_times_s",
        "due_rows",
        "end_steps",
        "follows",
        "has_failed",
        "is_begun",
        "is_over",
        "known_outputs",
        "positions",
        "reply_to",
        "sessions",
        "unready",
        "wants_state",
    )

    def __init__(
        self,
        sessions: list[Session],
        inputs: Steps,
        first_steps: Sequence[int] | None,
        reply_to: ReplyTo,
        wants_state: bool = False,
        follows: StepRequest | None = None,
        positions: Sequence[int] = (),
    ) -> None:
        """A request that nobody has seen yet.

        Args:
            sessions: S of one model, none twice.
            inputs: [S, T], T at least 1, checked.
            first_steps: S indices of the first steps, or None to run them as the next.
            reply_to: who waits for the answer.
            wants_state: whether the caller wants the state after the last step.
            follows: the request before it on its stream: if that one fails, this one is not begun.
            positions: S, where the sessions stand in what the caller sent.
        """
        super().__init__([session.session_id for session in sessions], (), inputs, (), ())
        self.is_from_caller = True
        self.sessions = sessions
        self._indices: Rows | None = None
        self.caller_inputs = inputs
        """As the caller sent them; `inputs` are those that have to run."""
        self.caller_steps = first_steps
        """`first_steps` are those of `inputs`."""
        self.reply_to = reply_to
        self.wants_state = wants_state
        self.follows = follows
        self.positions = positions
        self.known_outputs: Steps | None = None
        """[T'], of one session: of the steps that have run before."""
        self.unready: set[Session] | None = None
        """Of several sessions those whose turn has not come."""
        self.due_rows: frozenset[int] = frozenset()
        """Of the sessions whose state is to be their snapshot."""
        self.end_steps: Sequence[int] = ()
        """S, the counter after the last step, when it is over."""
        self.is_begun = False
        self.is_over = False
        """Answered, or cancelled."""
        self.has_failed = False
        self.commit_times_s: TimesS | None = None
        """From when to when the store was asked for its commit, by `time.perf_counter`."""

    @property
    def model(self) -> ServedModel:
        """Its sessions' model."""
        return self.sessions[0].model

    @property
    def index(self) -> int:
        """The one session's index in its table."""
        return self.sessions[0].index

    @property
    def indices(self) -> Rows:
        """Its sessions' indices in their table, [S]."""
        if self._indices is None:
            self._indices = np.fromiter([session.index for session in self.sessions], np.int64)
        return self._indices

    def prepare(
        self,
        inputs: Steps,
        first_steps: Sequence[int] | Rows,
        slots: Sequence[int] | Rows,
        write_slots: Sequence[int] | Rows,
        shared_slots: frozenset[int] = NO_SLOTS,
    ) -> None:
        """Its turn has come: say what is to run, as EngineRequest does."""
        self.inputs = inputs
        self.num_rows, self.num_left = inputs.shape
        self.first_steps = first_steps
        self.slots, self.write_slots, self.shared_slots = slots, write_slots, shared_slots
        self.reads_state = self.wants_state or bool(self.due_rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on without the sessions in the other rows, before it is begun."""
        rows = list(rows)
        self.sessions = [self.sessions[row] for row in rows]
        self._indices = None
        self.session_ids = [self.session_ids[row] for row in rows]
        self.inputs = self.caller_inputs = self.caller_inputs[rows]
        if self.caller_steps is not None:
            self.caller_steps = [self.caller_steps[row] for row in rows]
        self.positions = [self.positions[row] for row in rows] if self.positions else ()

    def result(self, row: int = 0) -> StepResult:
        """What became of one session's steps.

        Raises:
            ServingError: they failed.
        """
        if row in self.errors:
            raise self.errors[row]
        state = self.state if self.wants_state and self.state is not None else {}
        return StepResult(
            self.answer(row), self.end_steps[row], {name: values[row] for name, values in state.items()}
        )

    def answer(self, row: int = 0) -> Steps:
        """The outputs [T] of one session's steps that ended well."""
        if self.known_outputs is None:
            assert self.outputs is not None
            outputs: Steps = self.outputs[row]
            return outputs
        if self.outputs is None:
            return self.known_outputs
        return np.concatenate([self.known_outputs, self.outputs[row]])


class EngineCall(EngineRequest):
    """What the server itself asks of the engine, and a coroutine waits for: to read a state, or to restore one."""

    __slots__ = ("future",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As EngineRequest."""
        super().__init__(*args, **kwargs)
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Turn:
    """One session's exclusive use by a coroutine."""

    __slots__ = ("future", "has_failed", "is_begun", "session")

    def __init__(self, session: Session) -> None:
        """Its turn has not come."""
        self.session = session
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the turn has come; an exception if the session was lost before."""
        self.is_begun = False
        self.has_failed = False


Entry = StepRequest | Turn
"""What stands in a session's queue."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to one session's steps."""

    outputs: Steps
    """[T]."""
    next_step: int
    state: dict[str, Array]
    """By name, without the batch axis and in the graph's axes; empty unless it was asked for."""


class Nobody:
    """Whoever waited has left."""

    def reply(self, request: StepRequest) -> None:
        """Nothing is to be told."""

    def add(self, request: StepRequest) -> None:
        """Nothing is to be told."""


NOBODY = Nobody()


class Waiter:
    """A coroutine that waits for one request."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.future: asyncio.Future[StepRequest] = asyncio.get_running_loop().create_future()

    def reply(self, request: StepRequest) -> None:
        """Let the coroutine go on."""
        if not self.future.done():
            self.future.set_result(request)

    def add(self, request: StepRequest) -> None:
        """One session's request is never divided."""
        raise AssertionError


class BatchReply:
    """What the caller of several sessions' steps waits for: what became of each, when all have ended."""

    def __init__(self, session_ids: Sequence[str], num_steps: int) -> None:
        """Nothing is known yet of the T steps of S sessions."""
        self.session_ids = session_ids
        self.num_steps = num_steps
        self.requests: set[StepRequest] = set()
        """Those under way."""
        self.bringing_in: asyncio.Task[None] | None = None
        """Brings sessions into memory whose steps come then."""
        self.outputs: Steps | None = None
        """[S, T], zeros where a session failed; None if all did."""
        self.next_steps = [0] * len(session_ids)
        """0 where a session failed."""
        self.approximate: list[int] = []
        """Positions of the sessions that were once replayed on another machine or build than they ran on."""
        self.errors: dict[int, BaseException] = {}
        """By position."""
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_left = len(session_ids)

    def fail(self, position: int, error: BaseException) -> None:
        """Note that one session's steps cannot be run."""
        self.errors[position] = error
        self._end(1)

    def add(self, request: StepRequest) -> None:
        """Wait for one more request."""
        self.requests.add(request)

    def reply(self, request: StepRequest) -> None:
        """Note what became of a request's sessions."""
        self.requests.discard(request)
        positions = request.positions
        are_approximate = request.model.table.is_approximate.each[request.indices]
        if are_approximate.any():
            self.approximate += np.asarray(positions)[are_approximate].tolist()
        if not request.errors and len(positions) == len(self.session_ids) and request.known_outputs is None:
            self.outputs, self.next_steps = request.outputs, [*request.end_steps]
        else:
            for row, position in enumerate(positions):
                if row in request.errors:
                    self.errors[position] = request.errors[row]
                else:
                    answer = request.answer(row)
                    if self.outputs is None:
                        self.outputs = np.zeros((len(self.session_ids), self.num_steps), answer.dtype)
                    self.outputs[position] = answer
                    self.next_steps[position] = request.end_steps[row]
        self._end(len(positions))

    def _end(self, num_sessions: int) -> None:
        self._num_left -= num_sessions
        if not self._num_left and not self.future.done():
            self.future.set_result(None)
