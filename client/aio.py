"""The asyncio client. `sync.py` is its twin and documents every call; what they share is in `calls.py`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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


class AsyncClient:
    """As `Client`, for asyncio: `async with AsyncClient(...) as c, await c.session("copy") as s`."""

    def __init__(self, address: str, *, retry_for_s: float = 30.0, timeout_s: float = 60.0) -> None:
        """As `Client`; make it in the event loop that uses it."""
        self._channel = grpc.aio.insecure_channel(address, options=calls.CHANNEL_OPTIONS)
        # mypy-protobuf types the stubs for both kinds of channel alike; the awaitable ones are named by casts.
        self._sessions: Any = session_service_pb2_grpc.SessionServiceStub(self._channel)
        self._models_stub: Any = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._retrying = calls.retrying(retry_for_s)
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
        request = calls.batch_request(sessions, inputs)
        response = await self._call(self._sessions.BatchStep, request, sessions[0].session_id)
        return calls.batch_result(response, request, sessions)

    async def _session(self, created: session_pb2.Session) -> AsyncSession:
        key = (created.model_name, created.model_version)
        if key not in self._models:
            self._models[key] = Model(await self.model(*key))
        return AsyncSession(self, self._models[key], created.session_id, created.next_step)

    async def _call(self, rpc: Callable[..., Awaitable[T]], request: Any, session_id: str = "") -> T:
        async def attempt() -> T:
            return await rpc(request, timeout=self._timeout_s, metadata=calls.metadata(session_id))

        try:
            return await tenacity.AsyncRetrying(**self._retrying)(attempt)
        except grpc.RpcError as error:
            raise from_rpc(error) from error


class AsyncSession:
    """As `Session`, for asyncio. One task at a time: its steps have an order."""

    def __init__(self, client: AsyncClient, model: Model, session_id: str, next_step: int) -> None:
        """Made by `AsyncClient.session` and `AsyncClient.attach`."""
        self._client = client
        self._stub = client._sessions
        self.model = model
        self.session_id = session_id
        self.next_step = next_step
        """As `Session.next_step`."""

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
        chunks = self.model.chunks(self.model.inputs(inputs))
        with calls.all_or_back(self):
            return self.model.join([to_array((await self._step(chunk)).outputs) for chunk in chunks])

    async def step(self, inputs: npt.ArrayLike) -> Array:
        """As `Session.step`."""
        outputs: Array = (await self.run(np.asarray(inputs)[np.newaxis]))[0]
        return outputs

    async def trace(self, inputs: npt.ArrayLike, names: Sequence[str] = ()) -> Trace:
        """As `Session.trace`."""
        names = self.model.state_names(names)
        with calls.all_or_back(self):
            answers = [await self._step(row[np.newaxis], names) for row in self.model.inputs(inputs)]
        return calls.trace(answers, self.model, names)

    async def state(self, *names: str) -> dict[str, Array]:
        """As `Session.state`."""
        request = session_service_pb2.GetStateRequest(session_id=self.session_id, names=names)
        return calls.state_arrays(
            (await self._client._call(self._stub.GetState, request, self.session_id)).state
        )

    async def reset(self) -> None:
        """As `Session.reset`."""
        request = calls.reset_request(self.session_id, self.next_step)
        await self._client._call(self._stub.ResetSession, request, self.session_id)

    async def fork(self, session_id: str | None = None) -> AsyncSession:
        """As `Session.fork`."""
        request = calls.fork_request(self.session_id, self.next_step, session_id)
        forked = (await self._client._call(self._stub.ForkSession, request, self.session_id)).session
        return AsyncSession(self._client, self.model, forked.session_id, forked.next_step)

    async def delete(self) -> None:
        """As `Session.delete`."""
        request = session_service_pb2.DeleteSessionRequest(session_id=self.session_id, allow_missing=True)
        await self._client._call(self._stub.DeleteSession, request, self.session_id)

    async def _step(self, inputs: Array, names: Sequence[str] = ()) -> session_service_pb2.StepResponse:
        request = calls.step_request(self.session_id, self.next_step, inputs, names)
        answer: session_service_pb2.StepResponse = await self._client._call(
            self._stub.Step, request, self.session_id
        )
        self.next_step = answer.next_step
        return answer
