"""Flow: the messages of one stream. Which may be sent, which are unanswered, and what is sent again after it broke.

It does no I/O: `_async/stream.py` sends what is due here, and brings the answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ntm import _requests as requests
from ntm._errors import ClientError, UnavailableError
from ntm._progress import Ahead, SessionProgress
from ntm._steps import Inputs, Steps, inputs_of, outputs_of
from ntm.tensor import Array
from ntm.v1 import session_service_pb2


class Flow:
    """The messages of one stream: what is to be sent, what is unanswered, and which outputs are complete.

    Chunks go in by `add`, messages out by `due`, answers in by `answered`, outputs out by `ready`. After the stream
    broke, `unanswered` are the messages to begin again with.
    """

    def __init__(self, session: SessionProgress, max_in_flight: int) -> None:
        self._session = session
        self._max_messages = max_in_flight
        self._max_steps = session.model.info.limits.retry_window_steps
        self._sent_before = session._ahead.since(session.next_step)
        self._end_step = session.next_step
        self._chunks: deque[tuple[int, bool]] = deque()
        """For each chunk that is not given out: the step it ends before, and whether somebody waits for its outputs."""
        self._answered: list[tuple[_Message, Array]] = []
        """Of the first of these chunks."""
        self._unanswered: deque[_Message] = deque()
        self._unsent: deque[_Message] = deque()
        self._has_begun = False
        self._has_ended = False

    @property
    def wants_chunk(self) -> bool:
        """Whether the next chunk is to be taken."""
        return not self._has_ended and not self._unsent and len(self._unanswered) < self._max_messages

    @property
    def is_done(self) -> bool:
        """Whether all chunks were taken and given out."""
        return self._has_ended and not self._chunks

    def add(self, chunk: Inputs | Steps) -> None:
        """Take a chunk of T steps, after what an earlier stream sent ahead and this one does not repeat.

        Raises:
            ValueError: as `Model.inputs`.
        """
        chunk = chunk if isinstance(chunk, Steps) else Steps(chunk)
        inputs = self._session.model.inputs(chunk.inputs, resets=chunk.resets)
        before = self._sent_before.since(self._end_step)
        if not before.is_repeated_by(inputs):
            self._append(before.messages, is_wanted=False)
        self._append(self._session.model.chunks(inputs), is_wanted=True)

    def end(self) -> None:
        """There are no more chunks."""
        self._has_ended = True

    def due(self) -> list[session_service_pb2.StreamStepsRequest]:
        """The messages that may be sent now; they are unanswered from then on."""
        due = []
        while self._unsent and self._has_room_for(self._unsent[0]):
            self._unanswered.append(self._unsent.popleft())
            due.append(self._unanswered[-1].request)
        return due

    def unanswered(self) -> list[session_service_pb2.StreamStepsRequest]:
        """All messages that were due and are not answered, to begin a call with, the first or the next."""
        for message in self._unanswered:
            message.was_sent_before = self._has_begun
        self._has_begun = True
        return [message.request for message in self._unanswered]

    def answered(self, answer: session_service_pb2.StepResponse) -> None:
        """Take in the answer to the first message that had none."""
        self._answered.append((self._unanswered.popleft(), outputs_of(answer)))
        self._session.approximate = answer.approximate

    def ready(self) -> Array | None:
        """The outputs [T, ...output shape] of the next chunk, if they are complete: the session moves past it."""
        answered_step = self._unanswered[0].first_step if self._unanswered else self._sent_end_step
        while self._chunks and self._chunks[0][0] <= answered_step:
            self._session.next_step, is_wanted = self._chunks.popleft()
            outputs = [outputs for _, outputs in self._answered]
            self._answered.clear()
            if is_wanted:
                return self._session.model.join(outputs)
        return None

    def failed(self, error: ClientError) -> None:
        """The call ended. When the server refused the first unanswered message, those not sent before have not run.

        When the connection broke, or time ran out, all of them may have.
        """
        if error.reason and not isinstance(error, UnavailableError):
            self._unsent.extendleft(
                reversed([message for message in self._unanswered if not message.was_sent_before])
            )
            self._unanswered = deque(message for message in self._unanswered if message.was_sent_before)

    def ahead(self) -> Ahead:
        """The messages that may have run beyond the step that the session was moved to."""
        sent = (*(message for message, _ in self._answered), *self._unanswered)
        inputs = (inputs_of(message.request.step) for message in sent)
        before = self._sent_before.since(self._sent_end_step)
        return Ahead(self._session.next_step, (*inputs, *before.messages))

    @property
    def _sent_end_step(self) -> int:
        return self._unsent[0].first_step if self._unsent else self._end_step

    def _append(self, messages: Iterable[Array], is_wanted: bool) -> None:
        for inputs in messages:
            step = requests.step(self._session.session_id, self._end_step, inputs)
            self._unsent.append(_Message(session_service_pb2.StreamStepsRequest(step=step), len(inputs)))
            self._end_step += len(inputs)
        self._chunks.append((self._end_step, is_wanted))

    def _has_room_for(self, message: _Message) -> bool:
        if not self._unanswered:
            return True
        num_steps = message.end_step - self._unanswered[0].first_step
        return len(self._unanswered) < self._max_messages and num_steps <= self._max_steps


@dataclass(eq=False, slots=True)
class _Message:
    """A message of a stream, kept as it is sent: callers may fill one array with chunk after chunk."""

    request: session_service_pb2.StreamStepsRequest
    num_steps: int
    was_sent_before: bool = False
    """It was under way when the stream broke, so it may have run."""

    @property
    def first_step(self) -> int:
        return self.request.step.first_step

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps


def check_in_flight(max_in_flight: int) -> None:
    """That a stream may have a message under way."""
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight is {max_in_flight}: let at least 1 message be under way")
