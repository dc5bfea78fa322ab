"""Progress: how far a session has come, as its client knows it.

A session's steps are numbered, and `next_step` is the number of the next one. A stream sends messages before the
earlier ones are answered. When it ends, those whose answers nobody was given are kept here until their fate is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ntm._errors import InternalError, InvalidInputError
from ntm._model import Model
from ntm.tensor import Array
from ntm.v1 import session_pb2

REFUSALS = (InvalidInputError, InternalError)
"""Errors by which the server says that a message did not run, and will not."""


class SessionProgress:
    """How far a session has come: the part of `Session` and `AsyncSession` that does no I/O."""

    def __init__(self, model: Model, described: session_pb2.Session) -> None:
        self.model = model
        self.session_id = described.session_id
        self.next_step = described.next_step
        """Index of the next step. It moves only when a whole call was answered, or a stream has given out a chunk's
        outputs, so after an error the same call can be made again, and takes effect once."""
        self.approximate = described.approximate
        """True: as far as the last answer told, the session was recovered by replay on another machine or build than
        it ran on before, so that its outputs may differ in the last bits from an unbroken run."""
        self._ahead = Ahead()

    @property
    def num_steps_ahead(self) -> int:
        """Steps from `next_step` on that a stream sent before it ended, and that the session may have run."""
        return sum(map(len, self._ahead.since(self.next_step).messages))

    def _unsettled(self, inputs: Array | None) -> tuple[Array, ...]:
        """The messages sent ahead that have to run before a call with these inputs, or with none.

        Inputs that repeat them can be sent as they are: the server answers the steps that have run from its records.
        """
        if not self._ahead.messages:
            return ()
        ahead = self._ahead.since(self.next_step)
        return () if inputs is not None and ahead.is_repeated_by(inputs) else ahead.messages


@contextmanager
def all_or_back(session: SessionProgress) -> Iterator[None]:
    """Put the step counter back when one of a call's messages fails, so that the call can be repeated as it was."""
    start = session.next_step
    try:
        yield
    except BaseException:
        session.next_step = start
        raise


@dataclass(frozen=True)
class Ahead:
    """Messages that a stream sent and nobody was given the answers to: the session may have run them."""

    first_step: int = 0
    messages: tuple[Array, ...] = ()
    """[T, ...input shape] each, in the order and the pieces they were sent in."""

    def since(self, step: int) -> Ahead:
        """Those that are left when the session has come to a step; none, when it stands somewhere else."""
        if step < self.first_step:
            return Ahead(step)
        num_steps, left = step - self.first_step, []
        for message in self.messages:
            if num_steps < len(message):
                left.append(message[num_steps:])
            num_steps = max(0, num_steps - len(message))
        return Ahead(step, tuple(left))

    def is_repeated_by(self, inputs: Array) -> bool:
        """Whether inputs [T, ...input shape] are the same bytes, as far as both go."""
        for message in self.messages:
            num_steps = min(len(message), len(inputs))
            if message[:num_steps].tobytes() != inputs[:num_steps].tobytes():
                return False
            inputs = inputs[num_steps:]
        return True
