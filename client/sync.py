"""The synchronous client. `aio.py` is its twin; what they share is in `calls.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import tenacity

from client import calls
from client.calls import BatchResult, Model, Trace
from client.errors import ClientError, from_rpc
from ntm.tensor import Array, to_array
from ntm.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    session_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
)

T = TypeVar("T")


class Client:
    """A connection to a server; safe to use from several threads."""

    def __init__(self, address: str, *, retry_for_s: float = 30.0, timeout_s: float = 60.0) -> None:
        """Connect when first used.

        Args:
            address: HOST:PORT of the server.
            retry_for_s: how long to repeat a call while the server cannot be reached, in seconds.
            timeout_s: how long to wait for one answer, in seconds.
        """
        self._channel = grpc.insecure_channel(address, options=calls.CHANNEL_OPTIONS)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(self._channel)
        self._models_stub = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._retrying = calls.retrying(retry_for_s)
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
        """Run T steps of each of S sessions in one message.

        Args:
            sessions: S sessions, none twice, whose models take the same inputs.
            inputs: [S, T, ...input shape].

        Returns:
            The outputs, and the errors of sessions that failed; the others are not touched by them.
        """
        request = calls.batch_request(sessions, inputs)
        response = self._call(self._sessions.BatchStep, request, sessions[0].session_id)
        return calls.batch_result(response, request, sessions)

    def _session(self, created: session_pb2.Session) -> Session:
        key = (created.model_name, created.model_version)
        if key not in self._models:
            self._models[key] = Model(self.model(*key))
        return Session(self, self._models[key], created.session_id, created.next_step)

    def _call(self, rpc: Callable[..., T], request: Any, session_id: str = "") -> T:
        """Send a request that may be repeated, until it is answered or the time for retries is over."""
        metadata = calls.metadata(session_id)
        try:
            return tenacity.Retrying(**self._retrying)(
                rpc, request, timeout=self._timeout_s, metadata=metadata
            )
        except grpc.RpcError as error:
            raise from_rpc(error) from error


class Session:
    """A session on the server. Not thread-safe: its steps have an order."""

    def __init__(self, client: Client, model: Model, session_id: str, next_step: int) -> None:
        """Made by `Client.session` and `Client.attach`."""
        self._client = client
        self._stub = client._sessions
        self.model = model
        self.session_id = session_id
        self.next_step = next_step
        """Index of the next step. It moves only when a whole call was answered, so after an error the same call can
        be made again, and takes effect once."""

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
        chunks = self.model.chunks(self.model.inputs(inputs))
        with calls.all_or_back(self):
            return self.model.join([to_array(self._step(chunk).outputs) for chunk in chunks])

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
        with calls.all_or_back(self):
            answers = [self._step(row[np.newaxis], names) for row in self.model.inputs(inputs)]
        return calls.trace(answers, self.model, names)

    def state(self, *names: str) -> dict[str, Array]:
        """The state as it is, by name: the tensors named, or all."""
        request = session_service_pb2.GetStateRequest(session_id=self.session_id, names=names)
        return calls.state_arrays(self._client._call(self._stub.GetState, request, self.session_id).state)

    def reset(self) -> None:
        """Go back to the initial state; the step counter goes on."""
        request = calls.reset_request(self.session_id, self.next_step)
        self._client._call(self._stub.ResetSession, request, self.session_id)

    def fork(self, session_id: str | None = None) -> Session:
        """A new session that is an exact copy of this one, and independent from then on."""
        request = calls.fork_request(self.session_id, self.next_step, session_id)
        forked = self._client._call(self._stub.ForkSession, request, self.session_id).session
        return Session(self._client, self.model, forked.session_id, forked.next_step)

    def delete(self) -> None:
        """End the session; one that has ended already is no error."""
        request = session_service_pb2.DeleteSessionRequest(session_id=self.session_id, allow_missing=True)
        self._client._call(self._stub.DeleteSession, request, self.session_id)

    def _step(self, inputs: Array, names: Sequence[str] = ()) -> session_service_pb2.StepResponse:
        request = calls.step_request(self.session_id, self.next_step, inputs, names)
        answer = self._client._call(self._stub.Step, request, self.session_id)
        self.next_step = answer.next_step
        return answer
