"""Calls: what the synchronous and the asynchronous client have in common, all that does no I/O.

Requests are built and answers read here; `sync.py` and `aio.py` send them. When a call may be repeated and for
how long, what of a stream is sent again after it broke, and which items of a batch go where, is decided here too.

Shapes: T steps of one message or chunk, S sessions of a batch.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import tenacity

from ntm._errors import ClientError, InternalError, InvalidInputError, UnavailableError, from_status
from ntm.tensor import Array, numpy_dtype, to_array, to_message
from ntm.v1 import model_pb2, model_service_pb2, session_pb2, session_service_pb2

# The server keeps its answers below its own limit, so the client sets none.
# gRPC waits before it connects again, by default up to two minutes; the client's own pauses are enough.
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]

# What the server sets aside in a message for all but tensors.
_ENVELOPE_BYTES = 64 * 1024

REFUSALS = (InvalidInputError, InternalError)
"""Errors by which the server says that a message did not run, and will not."""


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


def retrying(retry_for_s: float, is_closed: Callable[[], bool]) -> dict[str, Any]:
    """tenacity's settings: repeat what was unavailable, with growing random pauses, for a bounded time.

    A call that ends because its own client was closed is not repeated.
    """
    return {
        "retry": tenacity.retry_if_exception(
            lambda error: isinstance(error, UnavailableError) and not is_closed()
        ),
        "wait": tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
        "stop": tenacity.stop_after_delay(retry_for_s),
        "reraise": True,
    }


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


def import_request(snapshot: bytes, session_id: str | None) -> session_service_pb2.ImportSessionRequest:
    """Asks for a session made from a snapshot, named so that a repeat makes no second one."""
    return session_service_pb2.ImportSessionRequest(
        snapshot=snapshot, session_id=session_id or new_id(), request_id=new_id()
    )


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


class SessionState:
    """What a client knows of a session: the part of `Session` and `AsyncSession` that does no I/O."""

    def __init__(self, model: Model, described: session_pb2.Session) -> None:
        self.model = model
        self.session_id = described.session_id
        self.next_step = described.next_step
        """Index of the next step. It moves only when a whole call was answered, or a stream has given out a chunk's
        outputs, so after an error the same call can be made again, and takes effect once."""
        self.approximate = described.approximate
        """True: as far as the last answer told, the session was recovered by replay on another machine or build than
        it ran on before, so that its outputs may differ in the last bits from an unbroken run."""
        # The client's own: what streams leave behind, and the one that is open.
        self.ahead = Ahead()
        self.open_stream: Connection | None = None

    @property
    def num_steps_ahead(self) -> int:
        """Steps from `next_step` on that a stream sent before it ended, and that the session may have run."""
        return sum(map(len, self.ahead.since(self.next_step).messages))

    def unsettled(self, inputs: Array | None) -> tuple[Array, ...]:
        """The messages sent ahead that have to run before a call with these inputs, or with none.

        Inputs that repeat them can be sent as they are: the server answers the steps that have run from its records.
        """
        if not self.ahead.messages:
            return ()
        ahead = self.ahead.since(self.next_step)
        return () if inputs is not None and ahead.is_repeated_by(inputs) else ahead.messages

    def end_stream(self) -> None:
        """End a stream that was left open."""
        if self.open_stream is not None:
            self.open_stream.end()

    def stepped(self, answer: session_service_pb2.StepResponse) -> None:
        """Take over what an answer tells of the session."""
        self.next_step = answer.next_step
        self.approximate = answer.approximate


@contextmanager
def all_or_back(session: SessionState) -> Iterator[None]:
    """Put the step counter back when one of a call's messages fails, so that the call can be repeated as it was."""
    start = session.next_step
    try:
        yield
    except BaseException:
        session.next_step = start
        raise


@dataclass(eq=False, slots=True)
class _Message:
    """A message of a stream, kept as it is sent: callers may fill one array with chunk after chunk."""

    request: session_service_pb2.StreamStepsRequest
    was_sent_before: bool = False
    """It was under way when the stream broke, so it may have run."""

    @property
    def first_step(self) -> int:
        return self.request.step.first_step

    @property
    def end_step(self) -> int:
        return self.first_step + self.request.step.inputs.shape[0]


class Flow:
    """The messages of one stream: what is to be sent, what is unanswered, and which outputs are complete.

    Chunks go in by `add`, messages out by `due`, answers in by `answered`, outputs out by `ready`. After the stream
    broke, `unanswered` are the messages to begin again with.
    """

    def __init__(self, session: SessionState, max_in_flight: int) -> None:
        self._session = session
        self._max_messages = max_in_flight
        self._max_steps = session.model.info.limits.retry_window_steps
        self._sent_before = session.ahead.since(session.next_step)
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

    def add(self, chunk: npt.ArrayLike) -> None:
        """Take a chunk [T, ...input shape], after what an earlier stream sent ahead and this one does not repeat.

        Raises:
            ValueError: as `Model.inputs`.
        """
        inputs = self._session.model.inputs(chunk)
        before = self._sent_before.since(self._end_step)
        if not before.is_repeated_by(inputs):
            self._append(before.messages, is_wanted=False)
        self._append(self._session.model.chunks(inputs), is_wanted=True)

    def end(self) -> None:
        """There are no more chunks."""
        self._has_ended = True

    def due(self) -> list[session_service_pb2.StreamStepsRequest]:
        """The messages that may be sent now; they are unanswered from then on."""
        requests = []
        while self._unsent and self._has_room_for(self._unsent[0]):
            self._unanswered.append(self._unsent.popleft())
            requests.append(self._unanswered[-1].request)
        return requests

    def unanswered(self) -> list[session_service_pb2.StreamStepsRequest]:
        """All messages that were due and are not answered, to begin a call with, the first or the next."""
        for message in self._unanswered:
            message.was_sent_before = self._has_begun
        self._has_begun = True
        return [message.request for message in self._unanswered]

    def answered(self, answer: session_service_pb2.StepResponse) -> None:
        """Take in the answer to the first message that had none."""
        self._answered.append((self._unanswered.popleft(), to_array(answer.outputs)))
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
        inputs = (to_array(message.request.step.inputs) for message in sent)
        before = self._sent_before.since(self._sent_end_step)
        return Ahead(self._session.next_step, (*inputs, *before.messages))

    @property
    def _sent_end_step(self) -> int:
        return self._unsent[0].first_step if self._unsent else self._end_step

    def _append(self, messages: Iterable[Array], is_wanted: bool) -> None:
        for inputs in messages:
            step = step_request(self._session.session_id, self._end_step, inputs)
            self._unsent.append(_Message(session_service_pb2.StreamStepsRequest(step=step)))
            self._end_step += len(inputs)
        self._chunks.append((self._end_step, is_wanted))

    def _has_room_for(self, message: _Message) -> bool:
        if not self._unanswered:
            return True
        num_steps = message.end_step - self._unanswered[0].first_step
        return len(self._unanswered) < self._max_messages and num_steps <= self._max_steps


class Connection:
    """What a stream sends and gets its answers on: one StreamSteps call at a time, and a new one where it broke.

    Here is what waits for nothing; its subclasses open calls and read answers.
    """

    def __init__(self, session: SessionState, flow: Flow) -> None:
        session.open_stream = self
        self._session = session
        self._flow = flow
        self._call: Any = None
        self._requests: Any = None
        """A queue that the call takes its messages from, up to a None."""

    def send(self, requests: Iterable[session_service_pb2.StreamStepsRequest]) -> None:
        """Send messages, if there is a call to send them on; a new one begins with all that are unanswered.

        Raises:
            RuntimeError: another call of the session has ended the stream.
        """
        if self._session.open_stream is not self:
            raise RuntimeError("another call of its session ended this stream: begin a new one")
        if self._call is not None:
            for request in requests:
                self._requests.put_nowait(request)

    def end(self) -> None:
        """Cancel what is under way, and leave to the session what it may have run."""
        if self._session.open_stream is self:
            self._hang_up()
            self._session.ahead = self._flow.ahead()
            self._session.open_stream = None

    def _hang_up(self) -> None:
        if self._call is not None:
            self._requests.put_nowait(None)
            self._call.cancel()
            self._call = None


def ended_early() -> UnavailableError:
    """A stream ended as if all was well, with messages unanswered."""
    return UnavailableError(
        grpc.StatusCode.UNAVAILABLE, "", "the stream ended before all of it was answered", {}
    )


def check_in_flight(max_in_flight: int) -> None:
    """That a stream may have a message under way."""
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight is {max_in_flight}: let at least 1 message be under way")


class Batch:
    """A BatchStep until each of its sessions has an answer: what is sent, in which groups, and what came back."""

    def __init__(self, sessions: Sequence[SessionState], inputs: Array) -> None:
        """Inputs [S, T, ...input shape]."""
        self.groups = [list(range(len(sessions)))]
        """Indices of the sessions that are still to be sent, one list for each call."""
        self.has_answers = False
        self._sessions = sessions
        self._inputs = inputs
        model = sessions[0].model
        self._outputs = np.zeros((*inputs.shape[:2], *model.spec.output.shape), model.output_dtype)
        self._errors: dict[int, ClientError] = {}
        self._were_misplaced: set[int] = set()

    def request(self, group: Sequence[int]) -> session_service_pb2.BatchStepRequest:
        """Numbered messages for the sessions of a group."""
        return session_service_pb2.BatchStepRequest(
            session_ids=[self._sessions[index].session_id for index in group],
            first_steps=[self._sessions[index].next_step for index in group],
            inputs=to_message(self._inputs[group]),
        )

    def metadata(self, group: Sequence[int]) -> tuple[tuple[str, str], ...]:
        """Sends a group to the replica of its first session."""
        return metadata(self._sessions[group[0]].session_id)

    def answered(self, group: Sequence[int], response: session_service_pb2.BatchStepResponse) -> None:
        """Keep the results of a group, and move its sessions that ran to their next step."""
        self.has_answers = True
        errors = {
            error.index: from_status(error.code, error.reason, error.message, dict(error.metadata))
            for error in response.errors
        }
        approximate = set(response.approximate)
        outputs = to_array(response.outputs) if response.HasField("outputs") else None
        for position, index in enumerate(group):
            if position in errors:
                self._errors[index] = errors[position]
                continue
            assert outputs is not None
            self._errors.pop(index, None)
            self._outputs[index] = outputs[position]
            self._sessions[index].next_step = response.next_steps[position]
            self._sessions[index].approximate = position in approximate

    def failed(self, group: Sequence[int], error: ClientError) -> None:
        """Keep the error of a group's call, unless there are no results that it would take away.

        Raises:
            ClientError: this error, when no group was answered yet.
        """
        if not self.has_answers:
            raise error
        self._errors.update(dict.fromkeys(group, error))

    def regroup(self) -> None:
        """Choose the groups to send again: by the replica that has them, and alone when that did not help.

        Raises:
            UnavailableError: there are some.
        """
        groups: dict[tuple[str, int | str], list[int]] = {}
        for number, group in enumerate(self.groups):
            for index in group:
                error = self._errors.get(index)
                if not isinstance(error, UnavailableError):
                    continue
                key: tuple[str, int | str] = ("as before", number)
                if error.reason == "WRONG_REPLICA":
                    is_second_time = index in self._were_misplaced
                    key = ("alone", index) if is_second_time else ("on", error.metadata.get("replica", ""))
                    self._were_misplaced.add(index)
                groups.setdefault(key, []).append(index)
        self.groups = list(groups.values())
        if self.groups:
            raise self._errors[self.groups[0][0]]

    def result(self) -> BatchResult:
        """What all the calls together came to."""
        return BatchResult(self._outputs, dict(sorted(self._errors.items())))


def batch_inputs(sessions: Sequence[SessionState], inputs: npt.ArrayLike) -> Array:
    """The inputs of a batch as an array [S, T, ...input shape].

    Raises:
        ValueError: there is no session, or as many rows as sessions are missing, or as `Model.inputs`.
    """
    if not sessions:
        raise ValueError("send at least one session")
    array = sessions[0].model.inputs(inputs, num_leading_axes=2)
    if len(array) != len(sessions):
        raise ValueError(f"inputs have {len(array)} rows for {len(sessions)} sessions: send one for each")
    return array


def state_arrays(tensors: Iterable[session_pb2.StateTensor]) -> dict[str, Array]:
    """State tensors by name."""
    return {tensor.name: to_array(tensor.value) for tensor in tensors}


def trace(answers: Sequence[session_service_pb2.StepResponse], model: Model, names: Iterable[str]) -> Trace:
    """The answers to single steps as one run."""
    states = [state_arrays(answer.state) for answer in answers]
    stacked = {name: np.stack([state[name] for state in states]) for name in names} if states else {}
    return Trace(model.join([to_array(answer.outputs) for answer in answers]), stacked)
