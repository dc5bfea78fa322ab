"""The client: a connection to a server, and what it can be asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt
import tenacity

from ntm import _requests as requests
from ntm._async.connection import AsyncConnection
from ntm._async.session import AsyncSession
from ntm._batch import Batch, batch_inputs
from ntm._channel import Tls, Token, tls_settings
from ntm._concurrency import AsyncFunction, async_begin, async_result
from ntm._errors import ClientError, UnavailableError, translated
from ntm._model import Model
from ntm._results import BatchResult
from ntm._retries import retrying
from ntm._routing import LOOKUP_INTERVAL_S, Address, Renewed, target
from ntm._steps import Inputs
from ntm.tensor import Array
from ntm.v1 import model_service_pb2, session_pb2, session_service_pb2

if TYPE_CHECKING:
    from ntm.v1.model_service_pb2_grpc import ModelServiceAsyncStub
    from ntm.v1.session_service_pb2_grpc import SessionServiceAsyncStub

T = TypeVar("T")


class AsyncClient:
    """A connection to a server, or to several replicas.

    Threads may share a `Client`; an `AsyncClient` belongs to the event loop that it was made in.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: bool | Tls = False,
        token: Token | None = None,
        retry_for_s: float = 30.0,
        timeout_s: float = 60.0,
    ) -> None:
        """Connect when first used.

        Args:
            address: HOST:PORT of the server, or of what routes calls to several. To choose the replica of each session
                itself, the client takes dns:///NAME:PORT, whose addresses are all replicas and may change, or a list
                of HOST:PORT. Names in a list are looked up once.
            tls: whether to encrypt and to verify the server; `Tls` says by which files.
            token: the bearer token that says who calls, or a function that gives it before each call. It is not sent
                to another machine without `tls`.
            retry_for_s: how long to repeat a call while the server cannot be reached, in seconds; of a stream, since
                its last answer.
            timeout_s: how long to wait for one answer, in seconds; after that a call fails and is not repeated.

        Raises:
            ValueError: an address that names no server, or a token without `tls`. OSError: a file of `tls` cannot be
                read, or a name in a list cannot be looked up.
        """
        where, settings = target(address), tls_settings(tls)
        self._connection = Renewed(
            lambda: AsyncConnection(where, settings, token),
            interval_s=LOOKUP_INTERVAL_S if where.is_looked_up else None,
            keep_s=retry_for_s + timeout_s,
        )
        self._is_closed = False
        self._retrying = retrying(retry_for_s, lambda: self._is_closed)
        self._timeout_s = timeout_s
        self._models: dict[tuple[str, int], Model] = {}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; sessions stay on the server."""
        self._is_closed = True
        for connection in self._connection.take_all():
            await connection.close()

    async def models(self) -> list[model_service_pb2.ModelVersion]:
        """The models in service."""
        answer = await self._call(self._model_service.ListModels, model_service_pb2.ListModelsRequest())
        return list(answer.models)

    async def model(self, name: str, version: int | None = None) -> model_service_pb2.GetModelResponse:
        """One model: its spec, where it runs, and its limits.

        Raises:
            NotFoundError: there is none of this name or version.
        """
        return await self._call(self._model_service.GetModel, requests.get_model(name, version))

    async def session(
        self,
        model_name: str,
        *,
        version: int | None = None,
        session_id: str | None = None,
        initial_state: Mapping[str, npt.ArrayLike] | None = None,
    ) -> AsyncSession:
        """Create a session; leaving its `with` block deletes it.

        Args:
            model_name: name of the model.
            version: version of the model; the newest by default.
            session_id: id of the session; 128 random bits by default.
            initial_state: values of states and session inputs, by name, that the session begins from and returns to by
                a reset; the model's own by default.

        Raises:
            ValueError, InvalidInputError: `initial_state` does not fit the model. NotFoundError: no such model.
            AlreadyExistsError: the id is taken. ResourceExhaustedError: no free slot.
        """
        values: dict[str, Array] = {}
        if initial_state:
            model = Model(await self.model(model_name, version))
            version, values = model.info.model.version, model.initial_state(initial_state)
        request = requests.create_session(model_name, version, session_id, values)
        answer = await self._call(self._sessions.CreateSession, request, request.session_id)
        return await self._session(answer.session)

    async def attach(self, session_id: str) -> AsyncSession:
        """Go on with a session that exists, at its next step.

        Raises:
            NotFoundError: there is none.
        """
        request = session_service_pb2.GetSessionRequest(session_id=session_id)
        answer = await self._call(self._sessions.GetSession, request, session_id)
        return await self._session(answer.session)

    async def sessions(self, model_name: str = "") -> AsyncIterator[session_pb2.Session]:
        """Every session on the server, or of one model, in order of id."""
        after = ""
        while True:
            request = session_service_pb2.ListSessionsRequest(page_token=after, model_name=model_name)
            page = await self._call(self._sessions.ListSessions, request)
            for session in page.sessions:
                yield session
            after = page.next_page_token
            if not after:
                return

    async def batch_step(
        self,
        sessions: Sequence[AsyncSession],
        inputs: Inputs,
        resets: npt.ArrayLike | None = None,
    ) -> BatchResult:
        """Run T steps of each of S sessions, in one message for each replica that has some of them.

        Args:
            sessions: S sessions, none twice, whose models take the same inputs.
            inputs: [S, T, ...input shape]; of models of several inputs a dict of such arrays, by name.
            resets: [S, T], which steps begin from their session's initial state; none does by default.

        Returns:
            The outputs, and the errors of sessions that failed; the others are not touched by them. What was
            unavailable has been repeated, as after any other call.

        Raises:
            ValueError: no sessions, or inputs of another shape. ClientError: one of its types, when no session ran.
        """
        steps = batch_inputs(sessions, inputs, resets)
        for session, row in zip(sessions, steps, strict=True):
            await session._begin(row)
        batch = Batch(sessions, steps)

        async def attempt() -> None:
            await self._send(batch)

        try:
            await self._retry(attempt)
        except UnavailableError:
            if not batch.has_answers:
                raise
        return batch.result()

    async def import_session(self, snapshot: bytes, *, session_id: str | None = None) -> AsyncSession:
        """Create a session from what a session's `export` gave, at the step it was taken at.

        Args:
            snapshot: a safetensors file.
            session_id: id of the new session; 128 random bits by default.

        Raises:
            InvalidInputError: the snapshot is damaged, or does not fit its model. PreconditionError: it comes from
                another model file. NotFoundError, AlreadyExistsError, ResourceExhaustedError: as `session`.
        """
        request = requests.import_session(snapshot, session_id)
        answer = await self._call(self._sessions.ImportSession, request, request.session_id)
        return await self._session(answer.session)

    @property
    def _sessions(self) -> SessionServiceAsyncStub:
        return self._connection.newest.sessions

    @property
    def _model_service(self) -> ModelServiceAsyncStub:
        return self._connection.newest.models

    async def _session(self, created: session_pb2.Session) -> AsyncSession:
        key = (created.model_name, created.model_version)
        if key not in self._models:
            self._models[key] = Model(await self.model(*key))
        return AsyncSession(self, self._models[key], created)

    async def _send(self, batch: Batch) -> None:
        """Send all groups of a batch at once, and take in their answers."""
        calls = [
            async_begin(
                self._sessions.BatchStep,
                batch.request(group),
                timeout=self._timeout_s,
                metadata=batch.metadata(group),
            )
            for group in batch.groups
        ]
        try:
            for group, call in zip(batch.groups, calls, strict=True):
                try:
                    with translated():
                        answer = await async_result(call)
                except ClientError as error:
                    batch.failed(group, error)
                else:
                    batch.answered(group, answer)
        finally:
            for call in calls:
                call.cancel()  # those that are not done: an error came first
        batch.regroup()

    async def _call(self, rpc: AsyncFunction[T], request: Any, session_id: str = "") -> T:
        """Send a request that may be repeated, until it is answered or the time for retries is over."""
        for connection in self._connection.take_unused():
            await connection.close()
        metadata = requests.metadata(session_id)

        async def attempt() -> T:
            with translated():
                return await rpc(request, timeout=self._timeout_s, metadata=metadata)

        return await self._retry(attempt)

    async def _retry(self, attempt: AsyncFunction[T]) -> T:
        return await tenacity.AsyncRetrying(**self._retrying)(attempt)
