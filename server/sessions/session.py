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
from server.engine.request import Message
from server.errors import ServingError
from server.runtime.runner import INITIAL_SLOT, Rows
from server.sessions.served_model import ServedModel
from server.storage.codec import About
from server.storage.interface import Entry


class Session:
    """A scratch memory and its history. What of it stands in its model's columns, by place, is shown as its own."""

    __slots__ = (
        "_about",
        "fence",
        "is_leaving",
        "is_ready",
        "loss",
        "model",
        "place",
        "request_id",
        "session_id",
        "waiting",
    )

    def __init__(
        self,
        session_id: str,
        request_id: str,
        model: ServedModel,
        place: int,
        about: About,
        fence: int,
        next_step: int,
        last_use_s: float,
        slot: int = INITIAL_SLOT,
    ) -> None:
        """A session with nothing on record, in a place that was taken for it.

        Args:
            session_id: its id.
            request_id: of the request that made it.
            model: its model.
            place: its place in the model's room.
            about: what its entry says.
            fence: under which this replica may write it.
            next_step: its counter.
            last_use_s: service time of its last call.
            slot: where its state is, held for it.
        """
        self.model = model
        self.place = place
        self.session_id = session_id
        self.request_id = request_id
        self.fence = fence
        model.room.num_failed += about.failure is not None
        self._about = about
        self.about = about
        self.slot = slot
        self.last_use_s = last_use_s
        self.waiting: deque[Call | Group] | None = None
        """Calls behind the first, in order of arrival."""
        self.is_ready = True
        """Its state is in its slot. Until then its calls wait."""
        self.is_leaving = False
        """The last call in its line gives it to another replica; no more may enter."""
        self.loss: ServingError | None = None
        """Why it is here no more: what every call that is still in its line is told."""
        model.room.session[place] = self
        model.histories.begin(place, next_step, about.reset_steps)

    @property
    def about(self) -> About:
        """What its entry says of it."""
        return self._about

    @about.setter
    def about(self, about: About) -> None:
        room, place = self.model.room, self.place
        room.num_failed += (about.failure is not None) - (self._about.failure is not None)
        self._about = about
        room.snapshot_step.one[place] = about.snapshot_step
        room.is_approximate.one[place] = about.is_approximate

    @property
    def next_step(self) -> int:
        """Index of the next step."""
        return self.model.histories.next_step.one[self.place]

    @property
    def slot(self) -> int:
        """Where its state is."""
        return self.model.room.slot.one[self.place]

    @slot.setter
    def slot(self, slot: int) -> None:
        self.model.room.slot.one[self.place] = slot

    @property
    def last_use_s(self) -> float:
        """Service time of its last call."""
        return self.model.room.last_use_s.one[self.place]

    @last_use_s.setter
    def last_use_s(self, last_use_s: float) -> None:
        self.model.room.last_use_s.one[self.place] = last_use_s

    @property
    def first_call(self) -> Call | Group | None:
        """The call that is being served, or is next."""
        call: Call | Group | None = self.model.room.first_call[self.place]
        return call

    @property
    def calls(self) -> list[Call | Group]:
        """All calls in its line."""
        first = self.first_call
        return [] if first is None else [first, *(self.waiting or ())]

    def line_up(self, call: Call | Group) -> bool:
        """Put a call at the end of its line; says whether it is the first."""
        room, place = self.model.room, self.place
        if room.first_call[place] is None:
            room.first_call[place] = call
            return True
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append(call)
        room.needs_care.one[place] = True
        return False

    def leave_line(self, call: Call | Group) -> None:
        """Take a call out of its line."""
        room, place, waiting = self.model.room, self.place, self.waiting
        if call is not room.first_call[place]:
            assert waiting is not None
            waiting.remove(call)
        else:
            room.first_call[place] = waiting.popleft() if waiting else None
        if waiting is not None and not waiting and self.loss is None:
            room.needs_care.one[place] = False

    def put_first(self, call: Call | Group) -> None:
        """Put a call in the place of the first in its line."""
        self.model.room.first_call[self.place] = call

    def give_up_place(self) -> None:
        """It is lost, and nothing uses its state or its history any more."""
        served, place = self.model, self.place
        if place != served.room.nowhere:
            self.place = served.room.nowhere
            served.room.num_failed -= self._about.failure is not None
            served.room.num_lost -= 1
            served.slots.release(served.room.slot.one[place])
            served.histories.end(place)
            served.room.give_up(place)

    @property
    def has_just_failed(self) -> bool:
        """Whether the last message failed, so that a repeat of it is answered without running it."""
        failure = self.about.failure
        return failure is not None and failure.first_step == self.next_step

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
    company: CallsTogether | None = None
    """With whom it shares that, unless it is alone."""
    has_failed: bool = False


@dataclass(eq=False, slots=True)
class BatchResult:
    """What became of the steps of several sessions."""

    outputs: Array | None
    """[S, T, ...output shape], zeros where a session failed; None if all did."""
    next_steps: list[int]
    """0 where a session failed."""
    approximate: list[int]
    """Indices of the sessions that were once replayed on another machine or build than they ran on."""
    errors: dict[int, BaseException]
    """By index."""


class Batch:
    """What the caller of several sessions' steps waits for: what became of each, when all have ended."""

    def __init__(self, session_ids: Sequence[str], inputs: Array, first_steps: Sequence[int]) -> None:
        """Nothing is known yet of the steps with inputs [S, T, ...input shape]."""
        self.session_ids = session_ids
        self.inputs = inputs
        self.first_steps = first_steps
        """As the caller says, or empty."""
        num_sessions = len(session_ids)
        self.future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
        self.calls: list[Call | Group] = []
        self._result = BatchResult(None, [0] * num_sessions, [], {})
        self._num_left = num_sessions

    def call(self, session: Session, begin: Callable[[Call], None], index: int) -> Call:
        """A call for one of the sessions."""
        call = Call(session, begin, self.future, partial(self._settle, session, index))
        self.calls.append(call)
        return call

    def settle_error(self, index: int, error: BaseException) -> None:
        """Note that one session's steps cannot be run."""
        self._result.errors[index] = error
        self._end(1)

    def settle_group(self, group: Group, outputs: Array, errors: Mapping[int, ServingError]) -> None:
        """Note what became of a group's steps: outputs [its sessions, T, ...output shape], and errors by row."""
        result, num_sessions = self._result, len(group.indices)
        next_steps = group.served.histories.next_step.each[group.places].tolist()
        are_approximate = group.served.room.is_approximate.each[group.places]
        if are_approximate.any():
            result.approximate += group.indices[are_approximate].tolist()
        if not errors and num_sessions == len(self.session_ids):
            result.outputs, result.next_steps = outputs, next_steps
            return self._end(num_sessions)
        for row, index in enumerate(group.indices.tolist()):
            if row in errors:
                result.errors[index] = errors[row]
            else:
                self._outputs_like(outputs[row])[index] = outputs[row]
                result.next_steps[index] = next_steps[row]
        return self._end(num_sessions)

    def _settle(self, session: Session, index: int, result: object) -> None:
        """Note what became of one session's steps."""
        if not isinstance(result, StepResult):
            assert isinstance(result, BaseException)
            return self.settle_error(index, result)
        self._outputs_like(result.outputs)[index] = result.outputs
        self._result.next_steps[index] = result.next_step
        if session.about.is_approximate:
            self._result.approximate.append(index)
        return self._end(1)

    def _outputs_like(self, outputs: Array) -> Array:
        if self._result.outputs is None:
            self._result.outputs = np.zeros((*self.inputs.shape[:2], *outputs.shape[1:]), outputs.dtype)
        return self._result.outputs

    def _end(self, num_sessions: int) -> None:
        self._num_left -= num_sessions
        if not self._num_left:
            self.calls.clear()  # they know the batch, and would stay with it until the collector comes
            if not self.future.done():
                self.future.set_result(self._result)


@dataclass(eq=False, slots=True, kw_only=True)
class Company:
    """Sessions of a model whose steps are one message."""

    served: ServedModel
    session_ids: Sequence[str]
    sessions: list[Session]
    places: Rows
    """Theirs, in their model's room."""
    inputs: Array
    """[sessions, T, ...input shape]."""
    message: Message | None = None
    """What they have in the engine's line."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on without the sessions in the other rows."""
        rows = list(rows)
        self.session_ids = [self.session_ids[row] for row in rows]
        self.sessions = [self.sessions[row] for row in rows]
        self.places, self.inputs = self.places[rows], self.inputs[rows]


@dataclass(eq=False, slots=True, kw_only=True)
class CallsTogether(Company):
    """Sessions that a call each runs the steps of: those whose turn came at once."""

    calls: list[Call]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on without the calls in the other rows."""
        super(CallsTogether, self).keep(rows)  # by name: a dataclass with slots is made twice
        self.calls = [self.calls[row] for row in rows]


@dataclass(eq=False, slots=True, kw_only=True)
class Group(Company):
    """Sessions of a batch that are served together, since nothing else is to be served before.

    It stands in the line of each of them: alone, or behind the same other group.
    """

    batch: Batch
    indices: Rows
    """Where the sessions stand in the batch."""
    first_steps: Sequence[int]
    """As its caller says, or empty."""
    begin: Callable[[Group], None]
    """Called when it is the turn of all its sessions."""
    waiting: set[Session] = field(default_factory=set)
    """Sessions whose turn has not come."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on without the sessions in the other rows."""
        rows = list(rows)
        super(Group, self).keep(rows)
        self.indices = self.indices[rows]
        self.first_steps = [self.first_steps[row] for row in rows] if self.first_steps else ()
