"""The synchronous client. `aio.py` is its twin; what they share is in `calls.py`."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import tenacity

from ntm import _calls as calls
from ntm._calls import Ahead, Batch, BatchResult, Connection, Flow, Model, SessionState, Trace
from ntm._errors import ClientError, DeadlineError, UnavailableError, translated
from ntm.tensor import Array, to_array
from ntm.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    session_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
)

T = TypeVar("T")

_END: Any = object()


class Client:
    """A connection to a server; safe to use from several threads."""

    def __init__(self, address: str, *, retry_for_s: float = 30.0, timeout_s: float = 60.0) -> None:
        """Connect when first used.

        Args:
            address: HOST:PORT of the server.
            retry_for_s: how long to repeat a call while the server cannot be reached, in seconds; of a stream, since
                its last answer.
            timeout_s: how long to wait for one answer, in seconds; after that a call fails and is not repeated.
        """
        self._channel = grpc.insecure_channel(address, options=calls.CHANNEL_OPTIONS)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(self._channel)
        self._models_stub = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._is_closed = False
        self._retrying = calls.retrying(retry_for_s, lambda: self._is_closed)
        self._timeout_s = timeout_s
        self._models: dict[tuple[str, int], Model] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; sessions stay on the server."""
        self._is_closed = True
        self._channel.close()

    def models(self) -> list[model_service_pb2.ModelVersion]:
        """The models in service."""
        request = model_service_pb2.ListModelsRequest()
        return list(self._call(self._models_stub.ListModels, request).models)

    def model(self, name: str, version: int | None = None) -> model_service_pb2.GetModelResponse:
        """One model: its spec, where it runs, and its limits.

        Raises:
            NotFoundError: there is none of this name or version.
        """
        return self._call(self._models_stub.GetModel, calls.model_request(name, version))

    def session(
        self, model_name: str, *, version: int | None = None, session_id: str | None = None
    ) -> Session:
        """Create a session; leaving its `with` block deletes it.

        Args:
            model_name: name of the model.
            version: version of the model; the newest by default.
            session_id: id of the session; 128 random bits by default.

        Raises:
            NotFoundError: no such model. AlreadyExistsError: the id is taken. ResourceExhaustedError: no free slot.
        """
        request = calls.create_request(model_name, version, session_id)
        created = self._call(self._sessions.CreateSession, request, request.session_id).session
        return self._session(created)

    def attach(self, session_id: str) -> Session:
        """Go on with a session that exists, at its next step.

        Raises:
            NotFoundError: there is none.
        """
        request = session_service_pb2.GetSessionRequest(session_id=session_id)
        return self._session(self._call(self._sessions.GetSession, request, session_id).session)

    def sessions(self, model_name: str = "") -> Iterator[session_pb2.Session]:
        """Every session on the server, or of one model, in order of id."""
        token = ""
        while True:
            request = session_service_pb2.ListSessionsRequest(page_token=token, model_name=model_name)
            page = self._call(self._sessions.ListSessions, request)
            yield from page.sessions
            token = page.next_page_token
            if not token:
                return

    def batch_step(self, sessions: Sequence[Session], inputs: npt.ArrayLike) -> BatchResult:
        """Run T steps of each of S sessions, in one message for each replica that has some of them.

        Args:
            sessions: S sessions, none twice, whose models take the same inputs.
            inputs: [S, T, ...input shape].

        Returns:
            The outputs, and the errors of sessions that failed; the others are not touched by them. What was
            unavailable has been repeated, as after any other call.

        Raises:
            ValueError: no sessions, or inputs of another shape. ClientError: one of its types, when no session ran.
        """
        inputs = calls.batch_inputs(sessions, inputs)
        for session, row in zip(sessions, inputs, strict=True):
            session._begin(row)
        batch = Batch(sessions, inputs)

        def attempt() -> None:
            # All groups are under way at once.
            sent = [
                self._sessions.BatchStep.future(
                    batch.request(group), timeout=self._timeout_s, metadata=batch.metadata(group)
                )
                for group in batch.groups
            ]
            for group, call in zip(batch.groups, sent, strict=True):
                try:
                    with translated():
                        response = call.result()
                except ClientError as error:
                    batch.failed(group, error)
                else:
                    batch.answered(group, response)
            batch.regroup()

        try:
            self._retry(attempt)
        except UnavailableError:
            if not batch.has_answers:
                raise
        return batch.result()

    def import_session(self, snapshot: bytes, *, session_id: str | None = None) -> Session:
        """Create a session from what `Session.export` gave, at the step it was taken at.

        Args:
            snapshot: a safetensors file.
            session_id: id of the new session; 128 random bits by default.

        Raises:
            InvalidInputError: the snapshot is damaged, or does not fit its model. PreconditionError: it comes from
                another model file. NotFoundError, AlreadyExistsError, ResourceExhaustedError: as `session`.
        """
        request = calls.import_request(snapshot, session_id)
        return self._session(self._call(self._sessions.ImportSession, request, request.session_id).session)

    def _session(self, created: session_pb2.Session) -> Session:
        key = (created.model_name, created.model_version)
        if key not in self._models:
            self._models[key] = Model(self.model(*key))
        return Session(self, self._models[key], created)

    def _call(self, rpc: Callable[..., T], request: Any, session_id: str = "") -> T:
        """Send a request that may be repeated, until it is answered or the time for retries is over."""
        metadata = calls.metadata(session_id)

        def attempt() -> T:
            with translated():
                return rpc(request, timeout=self._timeout_s, metadata=metadata)

        return self._retry(attempt)

    def _retry(self, attempt: Callable[[], T]) -> T:
        return tenacity.Retrying(**self._retrying)(attempt)


class Session(SessionState):
    """A session on the server. Not thread-safe: its steps have an order."""

    def __init__(self, client: Client, model: Model, described: session_pb2.Session) -> None:
        """Made by `Client.session`, `Client.attach` and `Client.import_session`."""
        super().__init__(model, described)
        self._client = client
        self._stub = client._sessions

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # An error on its way out matters more than a session that cannot be deleted.
        with contextlib.suppress(ClientError) if exc else contextlib.nullcontext():
            self.delete()

    def run(self, inputs: npt.ArrayLike) -> Array:
        """Run T steps, in as few messages as the server allows.

        Args:
            inputs: [T, ...input shape].

        Returns:
            Outputs [T, ...output shape].

        Raises:
            ClientError: one of its types. `next_step` is then where it was before, so the same call can be made
                again: the server answers the steps that have run from its records.
        """
        inputs = self.model.inputs(inputs)
        self._begin(inputs)
        with calls.all_or_back(self):
            return self.model.join(
                [to_array(self._step(chunk).outputs) for chunk in self.model.chunks(inputs)]
            )

    def stream(
        self, chunks: Iterable[npt.ArrayLike], *, max_in_flight: int = 4
    ) -> Generator[Array, None, None]:
        """Run one chunk of steps after another, sending ahead while earlier ones run.

        When the connection breaks, the stream goes on at its first unanswered message, and each step takes effect
        once. Every chunk's outputs are given out once, in order, and `next_step` moves with them.

        What was sent ahead of the outputs cannot be taken back. After a stream that was left early, or failed,
        `num_steps_ahead` says how many steps that may be. Going on with the same inputs, in whatever pieces, gives
        their outputs. Before a call with other inputs, or with none, they are run, once, and `next_step` moves past
        them: so what the session has seen does not depend on timing. With `max_in_flight=1` the next chunk is
        neither taken nor sent before the outputs of the one before it were given out and used: choose it where a
        chunk depends on those outputs, comes in as time goes by, or is not to run when the stream is left.

        Args:
            chunks: arrays [T, ...input shape], of any T each, taken as there is room to send them.
            max_in_flight: messages unanswered at most; the server's `retry_window_steps` bounds their steps too.

        Returns:
            A generator of outputs [T, ...output shape], one array for each chunk. It begins with its first `next`,
            ends early with `close`, and ends by itself when another call of this session begins.

        Raises:
            ValueError: a chunk of another shape, or a `max_in_flight` below 1. ClientError: one of its types.
            RuntimeError: the stream is asked for more after another call of its session has ended it.
        """
        calls.check_in_flight(max_in_flight)
        return self._run_stream(iter(chunks), max_in_flight)

    def _run_stream(
        self, chunks: Iterator[npt.ArrayLike], max_in_flight: int
    ) -> Generator[Array, None, None]:
        self.end_stream()
        flow = Flow(self, max_in_flight)
        stream = _Stream(self, flow)
        try:
            while True:
                stream.send(flow.due())
                if (outputs := flow.ready()) is not None:
                    yield outputs
                elif flow.wants_chunk:
                    chunk = next(chunks, _END)
                    flow.end() if chunk is _END else flow.add(chunk)
                elif flow.is_done:
                    stream.finish()
                    return
                else:
                    flow.answered(self._client._retry(stream.receive).step)
        finally:
            stream.end()

    def step(self, inputs: npt.ArrayLike) -> Array:
        """Run one step: inputs [...input shape] to outputs [...output shape]."""
        outputs: Array = self.run(np.asarray(inputs)[np.newaxis])[0]
        return outputs

    def trace(self, inputs: npt.ArrayLike, names: Sequence[str] = ()) -> Trace:
        """Run T steps one at a time, and look at the state after each.

        Args:
            inputs: [T, ...input shape].
            names: names of state tensors; all by default.

        Raises:
            ClientError: as `run`, but the state after steps that have run is not kept: go on with `run`.
        """
        names = self.model.state_names(names)
        inputs = self.model.inputs(inputs)
        self._begin(inputs)
        with calls.all_or_back(self):
            answers = [self._step(row[np.newaxis], names) for row in inputs]
        return calls.trace(answers, self.model, names)

    def state(self, *names: str) -> dict[str, Array]:
        """The state as it is, by name: the tensors named, or all."""
        self._begin()
        request = session_service_pb2.GetStateRequest(session_id=self.session_id, names=names)
        answer = self._client._call(self._stub.GetState, request, self.session_id)
        self.approximate = answer.approximate
        return calls.state_arrays(answer.state)

    def reset(self) -> None:
        """Go back to the initial state; the step counter goes on."""
        self._begin()
        request = calls.reset_request(self.session_id, self.next_step)
        answer = self._client._call(self._stub.ResetSession, request, self.session_id)
        self.approximate = answer.session.approximate

    def fork(self, session_id: str | None = None) -> Session:
        """A new session that is an exact copy of this one, and independent from then on."""
        self._begin()
        request = calls.fork_request(self.session_id, self.next_step, session_id)
        forked = self._client._call(self._stub.ForkSession, request, self.session_id).session
        return Session(self._client, self.model, forked)

    def export(self) -> bytes:
        """The whole state and the step counter as a safetensors file, for `Client.import_session`."""
        self._begin()
        request = session_service_pb2.ExportSessionRequest(session_id=self.session_id)
        return self._client._call(self._stub.ExportSession, request, self.session_id).snapshot

    def delete(self) -> None:
        """End the session; one that has ended already is no error."""
        self.end_stream()
        request = session_service_pb2.DeleteSessionRequest(session_id=self.session_id, allow_missing=True)
        self._client._call(self._stub.DeleteSession, request, self.session_id)

    def _begin(self, inputs: Array | None = None) -> None:
        """Before a call: end a stream that was left open, and run what it sent ahead, unless inputs repeat it."""
        self.end_stream()
        if unsettled := self.unsettled(inputs):
            with contextlib.suppress(*calls.REFUSALS):
                for message in unsettled:
                    self._step(message)
            self.ahead = Ahead()

    def _step(self, inputs: Array, names: Sequence[str] = ()) -> session_service_pb2.StepResponse:
        request = calls.step_request(self.session_id, self.next_step, inputs, names)
        answer = self._client._call(self._stub.Step, request, self.session_id)
        self.stepped(answer)
        return answer


class _Stream(Connection):
    """The connection of a synchronous stream."""

    def __init__(self, session: Session, flow: Flow) -> None:
        super().__init__(session, flow)
        self._client = session._client
        self._stub = session._stub

    def receive(self) -> session_service_pb2.StreamStepsResponse:
        """The next answer, if need be on a new call.

        Raises:
            UnavailableError: the stream broke. ClientError: as the server says.
        """
        is_new = self._call is None
        if is_new:
            self._open()
        try:
            with translated():
                answer: session_service_pb2.StreamStepsResponse | None = next(self._call, None)
            if answer is None:
                raise calls.ended_early()
        except ClientError as error:
            self._hang_up()
            self._flow.failed(error)
            # A call's time is counted from its beginning, and it had begun before this answer was waited for.
            if isinstance(error, DeadlineError) and not is_new:
                return self.receive()
            raise
        return answer

    def finish(self) -> None:
        """End the call, all being answered, so that the server counts it as a success."""
        if self._call is not None:
            self._requests.put_nowait(None)
            with contextlib.suppress(grpc.RpcError):
                next(self._call, None)

    def _open(self) -> None:
        self._requests = queue.SimpleQueue()
        self._call = self._stub.StreamSteps(
            iter(self._requests.get, None),
            timeout=self._client._timeout_s,
            metadata=calls.metadata(self._session.session_id),
        )
        self.send(self._flow.unanswered())
