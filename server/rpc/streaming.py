"""Streaming: a stream of steps is read ahead while its earlier messages are at work.

`session_service.py` checks each message and writes the answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from ntm.v1 import session_service_pb2
from server.errors import ServerStoppingError
from server.rpc.interceptors import MALFORMED, malformed
from server.security import split_key
from server.sessions.request import StepRequest, Waiter

Context = grpc.aio.ServicerContext[Any, Any]
Enter = Callable[[session_service_pb2.StepRequest, "EnteredStep | None"], Awaitable["EnteredStep"]]


class IdleStreams:
    """The streams that wait for their client: stopping ends them, and need not wait for them."""

    def __init__(self) -> None:
        """There are none."""
        self._is_stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """End them."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()

    async def read(self, context: Context, task: asyncio.Task[Any]) -> Any:
        """A stream's next message, or None at its end; to be called in the stream's own task.

        Raises:
            ServerStoppingError: the server stops meanwhile. InvalidInputError: its bytes are no message.
        """
        if self._is_stopping:
            raise ServerStoppingError
        self._tasks.add(task)
        try:
            request = await context.read()
            if request is MALFORMED:
                raise malformed()
            return None if request is grpc.aio.EOF else request
        except asyncio.CancelledError:
            if self._is_stopping:
                task.uncancel()
                raise ServerStoppingError from None
            raise
        finally:
            self._tasks.discard(task)


@dataclass(eq=False, slots=True)
class EnteredStep:
    """A step request that was admitted, and what its answer is to have."""

    request: StepRequest
    waiter: Waiter
    state_names: list[str]

    @property
    def session_id(self) -> str:
        """Whose steps they are, as the caller names it."""
        return split_key(self.request.sessions[0].session_id)[1]

    @property
    def future(self) -> asyncio.Future[StepRequest]:
        """Done when nobody waits any more."""
        return self.waiter.future


class ReadAhead:
    """Reads a stream while its earlier messages are at work, so that the engine need not wait for the transport.

    What it reads ahead is bounded, and gRPC's flow control then stops the client. A message for another session waits
    until those before it are answered. No more steps are unanswered than a session keeps answers for, so that a client
    whose stream breaks can repeat all of them.
    """

    _MOST_MESSAGES = 4

    def __init__(
        self,
        idle_streams: IdleStreams,
        enter: Enter,
        context: Context,
        max_unanswered_steps: int,
    ) -> None:
        self._idle_streams = idle_streams
        self._enter = enter
        self._context = context
        self._max_unanswered_steps = max_unanswered_steps
        self._unanswered: deque[EnteredStep] = deque()
        self._is_first_handed_out = False
        self._error: Exception | None = None
        self._has_ended = False
        self._arrived = asyncio.Event()
        self._answered = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def next(self) -> EnteredStep | None:
        """The next message in order, the one before it being answered; None at the stream's end.

        Raises:
            Whatever ended the stream, after all the messages before it.
        """
        if self._is_first_handed_out:
            self._unanswered.popleft()
            self._is_first_handed_out = False
            self._answered.set()
        while not self._unanswered:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        self._is_first_handed_out = True
        return self._unanswered[0]

    def close(self) -> list[EnteredStep]:
        """Read no more; returns what is not answered."""
        self._task.cancel()
        return [*self._unanswered]

    async def _read(self) -> None:
        last: EnteredStep | None = None
        try:
            while (request := await self._idle_streams.read(self._context, self._task)) is not None:
                while self._is_full(request.step):
                    self._answered.clear()
                    await self._answered.wait()
                last = await self._enter(request.step, last)
                self._unanswered.append(last)
                self._arrived.set()
        except Exception as error:  # told by `next`, in its turn
            self._error = error
        finally:
            self._has_ended = True
            self._arrived.set()

    def _is_full(self, request: session_service_pb2.StepRequest) -> bool:
        if not self._unanswered:
            return False
        if len(self._unanswered) >= self._MOST_MESSAGES:
            return True
        if request.session_id != self._unanswered[-1].session_id:
            return True  # it stands in another queue, and must not run if one before it fails
        shape = (request.named_inputs[0].value if request.named_inputs else request.inputs).shape
        num_steps = shape[0] if shape else 0
        for entered in self._unanswered:
            num_steps += entered.request.caller_inputs.shape[1]
        return num_steps > self._max_unanswered_steps
