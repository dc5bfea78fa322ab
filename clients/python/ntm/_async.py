"""The asyncio client. `sync.py` is its twin and documents every call; what they share is in `calls.py`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
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


class AsyncClient:
    """As `Client`, for asyncio: `async with AsyncClient(...) as c, await c.session("copy") as s`."""

    def __init__(self, address: str, *, retry_for_s: float = 30.0, timeout_s: float = 60.0) -> None:
        """As `Client`; make it in the event loop that uses it."""
        self._channel = grpc.aio.insecure_channel(address, options=calls.CHANNEL_OPTIONS)
        # mypy-protobuf types the stubs for both kinds of channel alike; the awaitable ones are named by casts.
        self._sessions: Any = session_service_pb2_grpc.SessionServiceStub(self._channel)
        self._models_stub: Any = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._is_closed = False
        self._retrying = calls.retrying(retry_for_s, lambda: self._is_closed)
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
        await self._channel.close()

    async def models(self) -> list[model_service_pb2.ModelVersion]:
        """As `Client.models`."""
        response = await self._call(self._models_stub.ListModels, model_service_pb2.ListModelsRequest())
        return list(response.models)

    async def model(self, name: str, version: int | None = None) -> model_service_pb2.GetModelResponse:
        """As `Client.model`."""
        return await self._call(self._models_stub.GetModel, calls.model_request(name, version))

    async def session(
        self, model_name: str, *, version: int | None = None, session_id: str | None = None
    ) -> AsyncSession:
        """As `Client.session`."""
        request = calls.create_request(model_name, version, session_id)
        response = await self._call(self._sessions.CreateSession, request, request.session_id)
        return await self._session(response.session)

    async def attach(self, session_id: str) -> AsyncSession:
        """As `Client.attach`."""
        request = session_service_pb2.GetSessionRequest(session_id=session_id)
        return await self._session((await self._call(self._sessions.GetSession, request, session_id)).session)

    async def sessions(self, model_name: str = "") -> AsyncIterator[session_pb2.Session]:
        """As `Client.sessions`."""
        token = ""
        while True:
            request = session_service_pb2.ListSessionsRequest(page_token=token, model_name=model_name)
            page = await self._call(self._sessions.ListSessions, request)
            for session in page.sessions:
                yield session
            token = page.next_page_token
            if not token:
                return

    async def batch_step(self, sessions: Sequence[AsyncSession], inputs: npt.ArrayLike) -> BatchResult:
        """As `Client.batch_step`."""
        inputs = calls.batch_inputs(sessions, inputs)
        for session, row in zip(sessions, inputs, strict=True):
            await session._begin(row)
        batch = Batch(sessions, inputs)

        async def send(group: Sequence[int]) -> None:
            try:
                with translated():
                    response = await self._sessions.BatchStep(
                        batch.request(group), timeout=self._timeout_s, metadata=batch.metadata(group)
                    )
            except ClientError as error:
                batch.failed(group, error)
            else:
                batch.answered(group, response)

        async def attempt() -> None:
            await asyncio.gather(*map(send, batch.groups))
            batch.regroup()

        try:
            await self._retry(attempt)
        except UnavailableError:
            if not batch.has_answers:
                raise
        return batch.result()

    async def import_session(self, snapshot: bytes, *, session_id: str | None = None) -> AsyncSession:
        """As `Client.import_session`."""
        request = calls.import_request(snapshot, session_id)
        response = await self._call(self._sessions.ImportSession, request, request.session_id)
        return await self._session(response.session)

    async def _session(self, created: session_pb2.Session) -> AsyncSession:
        key = (created.model_name, created.model_version)
        if key not in self._models:
            self._models[key] = Model(await self.model(*key))
        return AsyncSession(self, self._models[key], created)

    async def _call(self, rpc: Callable[..., Awaitable[T]], request: Any, session_id: str = "") -> T:
        metadata = calls.metadata(session_id)

        async def attempt() -> T:
            with translated():
                return await rpc(request, timeout=self._timeout_s, metadata=metadata)

        return await self._retry(attempt)

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await tenacity.AsyncRetrying(**self._retrying)(attempt)


class AsyncSession(SessionState):
    """As `Session`, for asyncio. One task at a time: its steps have an order."""

    def __init__(self, client: AsyncClient, model: Model, described: session_pb2.Session) -> None:
        """Made by `AsyncClient.session`, `AsyncClient.attach` and `AsyncClient.import_session`."""
        super().__init__(model, described)
        self._client = client
        self._stub = client._sessions

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ClientError) if exc else contextlib.nullcontext():
            await self.delete()

    async def run(self, inputs: npt.ArrayLike) -> Array:
        """As `Session.run`."""
        inputs = self.model.inputs(inputs)
        await self._begin(inputs)
        with calls.all_or_back(self):
            return self.model.join(
                [to_array((await self._step(chunk)).outputs) for chunk in self.model.chunks(inputs)]
            )

    def stream(
        self, chunks: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike], *, max_in_flight: int = 4
    ) -> AsyncGenerator[Array, None]:
        """As `Session.stream`, and chunks may come from an asynchronous iterable.

        After a `break` the generator is still open, as asynchronous ones are: another call of the session ends it, or
        its `aclose`.
        """
        calls.check_in_flight(max_in_flight)
        source = aiter(chunks) if isinstance(chunks, AsyncIterable) else iter(chunks)
        return self._run_stream(source, max_in_flight)

    async def _run_stream(
        self, chunks: AsyncIterator[npt.ArrayLike] | Iterator[npt.ArrayLike], max_in_flight: int
    ) -> AsyncGenerator[Array, None]:
        self.end_stream()
        flow = Flow(self, max_in_flight)
        stream = _Stream(self, flow)
        try:
            while True:
                stream.send(flow.due())
                if (outputs := flow.ready()) is not None:
                    yield outputs
                elif flow.wants_chunk:
                    chunk = await _next(chunks)
                    flow.end() if chunk is _END else flow.add(chunk)
                elif flow.is_done:
                    await stream.finish()
                    return
                else:
                    flow.answered((await self._client._retry(stream.receive)).step)
        finally:
            stream.end()

    async def step(self, inputs: npt.ArrayLike) -> Array:
        """As `Session.step`."""
        outputs: Array = (await self.run(np.asarray(inputs)[np.newaxis]))[0]
        return outputs

    async def trace(self, inputs: npt.ArrayLike, names: Sequence[str] = ()) -> Trace:
        """As `Session.trace`."""
        names = self.model.state_names(names)
        inputs = self.model.inputs(inputs)
        await self._begin(inputs)
        with calls.all_or_back(self):
            answers = [await self._step(row[np.newaxis], names) for row in inputs]
        return calls.trace(answers, self.model, names)

    async def state(self, *names: str) -> dict[str, Array]:
        """As `Session.state`."""
        await self._begin()
        request = session_service_pb2.GetStateRequest(session_id=self.session_id, names=names)
        answer = await self._client._call(self._stub.GetState, request, self.session_id)
        self.approximate = answer.approximate
        return calls.state_arrays(answer.state)

    async def reset(self) -> None:
        """As `Session.reset`."""
        await self._begin()
        request = calls.reset_request(self.session_id, self.next_step)
        answer = await self._client._call(self._stub.ResetSession, request, self.session_id)
        self.approximate = answer.session.approximate

    async def fork(self, session_id: str | None = None) -> AsyncSession:
        """As `Session.fork`."""
        await self._begin()
        request = calls.fork_request(self.session_id, self.next_step, session_id)
        forked = (await self._client._call(self._stub.ForkSession, request, self.session_id)).session
        return AsyncSession(self._client, self.model, forked)

    async def export(self) -> bytes:
        """As `Session.export`."""
        await self._begin()
        request = session_service_pb2.ExportSessionRequest(session_id=self.session_id)
        answer: session_service_pb2.ExportSessionResponse = await self._client._call(
            self._stub.ExportSession, request, self.session_id
        )
        return answer.snapshot

    async def delete(self) -> None:
        """As `Session.delete`."""
        self.end_stream()
        request = session_service_pb2.DeleteSessionRequest(session_id=self.session_id, allow_missing=True)
        await self._client._call(self._stub.DeleteSession, request, self.session_id)

    async def _begin(self, inputs: Array | None = None) -> None:
        self.end_stream()
        if unsettled := self.unsettled(inputs):
            with contextlib.suppress(*calls.REFUSALS):
                for message in unsettled:
                    await self._step(message)
            self.ahead = Ahead()

    async def _step(self, inputs: Array, names: Sequence[str] = ()) -> session_service_pb2.StepResponse:
        request = calls.step_request(self.session_id, self.next_step, inputs, names)
        answer: session_service_pb2.StepResponse = await self._client._call(
            self._stub.Step, request, self.session_id
        )
        self.stepped(answer)
        return answer


class _Stream(Connection):
    """The connection of an asynchronous stream; as the one in `sync.py`."""

    def __init__(self, session: AsyncSession, flow: Flow) -> None:
        super().__init__(session, flow)
        self._client = session._client
        self._stub = session._stub

    async def receive(self) -> session_service_pb2.StreamStepsResponse:
        is_new = self._call is None
        if is_new:
            self._open()
        try:
            with translated():
                answer: session_service_pb2.StreamStepsResponse | None = await anext(aiter(self._call), None)
            if answer is None:
                raise calls.ended_early()
        except ClientError as error:
            self._hang_up()
            self._flow.failed(error)
            if isinstance(error, DeadlineError) and not is_new:
                return await self.receive()
            raise
        return answer

    async def finish(self) -> None:
        if self._call is not None:
            self._requests.put_nowait(None)
            with contextlib.suppress(grpc.RpcError):
                await anext(aiter(self._call), None)

    def _open(self) -> None:
        self._requests = asyncio.Queue()
        self._call = self._stub.StreamSteps(
            _until_none(self._requests),
            timeout=self._client._timeout_s,
            metadata=calls.metadata(self._session.session_id),
        )
        self.send(self._flow.unanswered())


async def _until_none(requests: asyncio.Queue[T | None]) -> AsyncIterator[T]:
    while (request := await requests.get()) is not None:
        yield request


async def _next(chunks: AsyncIterator[T] | Iterator[T]) -> T:
    """The next chunk, or `_END`."""
    if isinstance(chunks, AsyncIterator):
        return await anext(chunks, _END)
    return next(chunks, _END)
