"""A session: its steps, its state and its end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ntm import _requests as requests
from ntm._async.stream import AsyncStream
from ntm._concurrency import END, AsyncChunkIterator, AsyncChunks, async_chunk_iterator, async_next_chunk
from ntm._errors import ClientError, translated
from ntm._flow import Flow, check_in_flight
from ntm._model import Model
from ntm._progress import REFUSALS, Ahead, SessionProgress, all_or_back
from ntm._results import Trace, Watched, state_arrays, trace_of, watched
from ntm._steps import Inputs, Outputs, outputs_of, shown
from ntm.tensor import Array
from ntm.v1 import session_pb2, session_service_pb2

if TYPE_CHECKING:
    from ntm._async.client import AsyncClient


class AsyncSession(SessionProgress):
    """A session on the server. One thread or task at a time: its steps have an order."""

    def __init__(self, client: AsyncClient, model: Model, described: session_pb2.Session) -> None:
        """Made by the client's `session`, `attach` and `import_session`, and by `fork`."""
        super().__init__(model, described)
        self._client = client
        self._open_stream: AsyncStream | None = None

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # An error on its way out matters more than a session that cannot be deleted.
        with contextlib.suppress(ClientError) if exc else contextlib.nullcontext():
            await self.delete()

    async def run(self, inputs: Inputs, resets: npt.ArrayLike | None = None) -> Outputs:
        """Run T steps, in as few messages as the server allows.

        Args:
            inputs: [T, ...input shape]; of a model of several inputs a dict of such arrays, by name.
            resets: [T], which steps begin from the session's initial state; none does by default.

        Returns:
            Outputs [T, ...output shape]; of a model of several outputs a dict of such arrays, by name.

        Raises:
            ClientError: one of its types. `next_step` is then where it was before, so the same call can be made
                again: the server answers the steps that have run from its records.
        """
        steps = self.model.inputs(inputs, resets=resets)
        await self._begin(steps)
        with all_or_back(self):
            answers = [await self._step(chunk) for chunk in self.model.chunks(steps)]
            return shown(self.model.join([outputs_of(answer) for answer in answers]))

    def stream(self, chunks: AsyncChunks, *, max_in_flight: int = 4) -> AsyncGenerator[Outputs, None]:
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
            chunks: inputs as `run` takes them, of any T each, or `Steps` where some are reset, taken as there is room
                to send them. With asyncio they may come from an asynchronous iterable.
            max_in_flight: messages unanswered at most; the server's `retry_window_steps` bounds their steps too.

        Returns:
            A generator of outputs [T, ...output shape], one array for each chunk. It begins when it is first asked,
            and ends when it is closed or another call of this session begins. A `break` closes a synchronous generator
            and leaves an asynchronous one open.

        Raises:
            ValueError: a chunk of another shape, or a `max_in_flight` below 1. ClientError: one of its types.
            RuntimeError: the stream is asked for more after another call of its session has ended it.
        """
        check_in_flight(max_in_flight)
        return self._run_stream(async_chunk_iterator(chunks), max_in_flight)

    async def _run_stream(
        self, chunks: AsyncChunkIterator, max_in_flight: int
    ) -> AsyncGenerator[Outputs, None]:
        self._end_stream()
        flow = Flow(self, max_in_flight)
        stream = AsyncStream(self, flow)
        try:
            while True:
                stream.send(flow.due())
                if (outputs := flow.ready()) is not None:
                    yield shown(outputs)
                elif flow.wants_chunk:
                    chunk = await async_next_chunk(chunks)
                    flow.end() if chunk is END else flow.add(chunk)
                elif flow.is_done:
                    await stream.finish()
                    return
                else:
                    answer = await self._client._retry(stream.receive)
                    flow.answered(answer.step)
        finally:
            stream.end()

    async def step(self, inputs: Inputs) -> Outputs:
        """Run one step: inputs [...input shape] to outputs [...output shape]; dicts where there are several."""
        if isinstance(inputs, Mapping):
            outputs = await self.run({name: np.asarray(value)[np.newaxis] for name, value in inputs.items()})
        else:
            outputs = await self.run(np.asarray(inputs)[np.newaxis])
        if isinstance(outputs, dict):
            return {name: value[0] for name, value in outputs.items()}
        return outputs[0]

    async def trace(
        self, inputs: Inputs, names: Sequence[str] = (), resets: npt.ArrayLike | None = None
    ) -> Trace:
        """Run T steps, and look at the state after each.

        Args:
            inputs: as `run` takes them.
            names: names of state tensors; all by default.
            resets: as `run` takes them.

        Raises:
            ClientError: as `run`, but the state after steps that have run is not kept: go on with `run`.
        """
        names = self.model.state_names(names)
        steps = self.model.inputs(inputs, resets=resets)
        await self._begin(steps)
        with all_or_back(self):
            answers = [await self._step(chunk, names) for chunk in self.model.chunks(steps, names)]
        return trace_of(answers, self.model, names)

    async def state(self, *names: str) -> dict[str, Array]:
        """The state as it is, by name: the tensors named, or all."""
        await self._begin()
        request = session_service_pb2.GetStateRequest(session_id=self.session_id, names=names)
        answer = await self._client._call(self._client._sessions.GetState, request, self.session_id)
        self.approximate = answer.approximate
        return state_arrays(answer.state)

    async def watch(self, *names: str) -> AsyncGenerator[Watched, None]:
        """What happens in the session from now on, whoever steps it, without disturbing it.

        The first that comes is the state as it is, and then each message that was applied. Who takes them slowly loses
        some, and is told how many. Another thread or task may use the session meanwhile, which its `next_step` does
        not follow.

        Args:
            names: names of state tensors to have after each message; none by default.

        Raises:
            NotFoundError: the session has ended. UnavailableError: it has left the server's memory, or the connection
                broke: watch again.
        """
        request = session_service_pb2.WatchSessionRequest(session_id=self.session_id, include_state=names)
        call = self._client._sessions.WatchSession(request, metadata=requests.metadata(self.session_id))
        try:
            with translated():
                async for answer in call:
                    yield watched(answer)
        finally:
            call.cancel()

    async def reset(self) -> None:
        """Go back to the initial state; the step counter goes on."""
        await self._begin()
        request = requests.reset_session(self.session_id, self.next_step)
        answer = await self._client._call(self._client._sessions.ResetSession, request, self.session_id)
        self.approximate = answer.session.approximate

    async def fork(self, session_id: str | None = None) -> AsyncSession:
        """A new session that is an exact copy of this one, and independent from then on."""
        await self._begin()
        request = requests.fork_session(self.session_id, self.next_step, session_id)
        answer = await self._client._call(self._client._sessions.ForkSession, request, self.session_id)
        return AsyncSession(self._client, self.model, answer.session)

    async def export(self) -> bytes:
        """The whole state and the step counter as a safetensors file, for the client's `import_session`."""
        await self._begin()
        request = session_service_pb2.ExportSessionRequest(session_id=self.session_id)
        answer = await self._client._call(self._client._sessions.ExportSession, request, self.session_id)
        return answer.snapshot

    async def delete(self) -> None:
        """End the session; one that has ended already is no error."""
        self._end_stream()
        request = session_service_pb2.DeleteSessionRequest(session_id=self.session_id, allow_missing=True)
        await self._client._call(self._client._sessions.DeleteSession, request, self.session_id)

    async def _begin(self, inputs: Array | None = None) -> None:
        """Before a call: end a stream that was left open, and run what it sent ahead, unless inputs repeat it."""
        self._end_stream()
        if unsettled := self._unsettled(inputs):
            with contextlib.suppress(*REFUSALS):
                for message in unsettled:
                    await self._step(message)
            self._ahead = Ahead()

    def _end_stream(self) -> None:
        if self._open_stream is not None:
            self._open_stream.end()

    async def _step(self, inputs: Array, names: Sequence[str] = ()) -> session_service_pb2.StepResponse:
        request = requests.step(self.session_id, self.next_step, inputs, names)
        answer = await self._client._call(self._client._sessions.Step, request, self.session_id)
        self.next_step, self.approximate = answer.next_step, answer.approximate
        return answer
