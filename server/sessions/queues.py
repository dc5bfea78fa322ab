"""Queues: one session's entries, in order of arrival, one at a time.

An entry is a request for steps, begun when it is the first in the queue of each of its sessions, or a turn, for
whatever else is done with a session alone. `executor.py` runs the steps; `manager.py` and `pager.py` take turns.

Everything here runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from server.errors import LeaseLapsedError, QueueFullError, QueueTooSlowError, ServingError
from server.runtime.runner import Rows
from server.sessions.request import StepRequest, Turn
from server.sessions.served_model import ServedModel
from server.sessions.session import Session
from server.sessions.table import SessionTable
from server.sessions.watching import Watching
from server.storage.async_store import AsyncStore

T = TypeVar("T")


class SessionQueues:
    """The sessions in memory, and what waits for each."""

    def __init__(self, store: AsyncStore, begin: Callable[[StepRequest], None]) -> None:
        """No session is in memory.

        Args:
            store: says what time it is, and whether this replica's lease holds.
            begin: called with a request whose turn has come.
        """
        self.in_memory: dict[str, Session] = {}
        """By id."""
        self.wanted: Counter[str] = Counter()
        """Ids of sessions that somebody is about to enqueue something for: they are not idle."""
        self._store = store
        self._begin = begin
        self._tasks: set[asyncio.Task[Any]] = set()
        self.watching = Watching()

    def no_longer_wanted(self, session_id: str) -> None:
        """What was counted in `wanted` has been enqueued, or will not be."""
        self.wanted[session_id] -= 1
        if not self.wanted[session_id]:
            del self.wanted[session_id]

    # Steps.

    def enqueue(self, request: StepRequest) -> None:
        """Put a request at the end of its sessions' queues, and begin it if it is the first in all.

        Raises:
            QueueFullError. SessionMovedError or what else became of the session, if it is one.
        """
        sessions, model = request.sessions, request.model
        if model.num_pending + len(sessions) > model.limits.max_pending_messages:
            raise queue_full(model)
        if model.engine.wait_limit.is_reached:
            raise queue_too_slow(model)
        if len(sessions) == 1:
            (session,) = sessions
            session.check_may_enter()
            model.num_pending += 1
            if session.enqueue(request):
                self.advance(session)
            return
        model.num_pending += len(sessions)
        table, indices = model.table, request.indices
        if table.is_idle.each[indices].all():  # one operation instead of one for each session
            for index in indices.tolist():
                table.head[index] = request
            table.is_idle.each[indices] = False
        else:
            request.unready = {
                session for session in sessions if not session.enqueue(request) or not session.is_ready
            }
        if not request.unready:
            self._begin_apart(request)

    def advance(self, session: Session) -> None:
        """Begin what can be begun; to be called whenever a session's queue or what it waits for has changed."""
        while (entry := session.head) is not None and (session.is_ready or session.loss):
            if entry.is_begun:
                return
            if isinstance(entry, Turn):
                if session.loss is None:
                    entry.is_begun = True
                    entry.future.set_result(None)
                    return
                self._dequeue(entry, session)
                entry.future.set_exception(session.loss)
            elif session.loss is not None:
                self._drop(entry, session, session.loss)
            elif entry.follows is not None and entry.follows.has_failed:
                # Whoever sent it knows already that it is not run.
                entry.has_failed = entry.is_over = True
                entry.follows = None
                self._dequeue(entry, session)
            else:
                if entry.unready is not None:
                    entry.unready.discard(session)
                    if entry.unready:
                        return
                self._begin(entry)
                if entry.is_over and len(entry.sessions) > 1:
                    for other in entry.sessions:
                        if other is not session:
                            self.advance(other)
        if entry is None and session.is_ready:
            if session.loss:
                session.give_up_index()
            else:
                self._rest(session.table, session.index)

    def leave(self, model: ServedModel, requests: Sequence[StepRequest]) -> None:
        """Take requests of one model that are over out of their queues, and begin what stands behind them."""
        table = model.table
        if len(requests) == 1 and len(requests[0].sessions) == 1:
            (session,) = requests[0].sessions
            self.leave_one(requests[0], session)
            return self.advance(session)
        indices = np.fromiter(
            chain.from_iterable([r.indices.tolist() if r.num_rows > 1 else (r.index,) for r in requests]),
            np.int64,
        )
        model.num_pending -= len(indices)
        table.last_use_s.each[indices] = self._store.service_time_s
        if not table.needs_attention.each[indices].any():
            for index in indices.tolist():
                table.head[index] = None
            return self._rest(table, indices)
        for request in requests:
            for session in request.sessions:
                session.dequeue(request)
                self.advance(session)
        return None

    def leave_one(self, entry: StepRequest | Turn, session: Session) -> None:
        """Take what is over out of a session's queue; whatever is behind it is begun by `advance`."""
        session.dequeue(entry)
        session.last_use_s = self._store.service_time_s
        session.model.num_pending -= 1

    def withdraw(self, request: StepRequest) -> None:
        """Take a request out that is not begun."""
        behind = [session for session in request.sessions if session.head is request]
        for session in request.sessions:
            self._dequeue(request, session)
        for session in behind:
            self.advance(session)

    # Turns.

    def enter(self, session: Session, needs_device: bool = False, is_our_own: bool = False) -> Turn:
        """Take one's place in a session's queue, to be followed by `finish`.

        A turn that neither needs the device nor has to wait is never one too many, nor is one of our own.

        Raises:
            QueueFullError; SessionMovedError or what else became of the session.
        """
        session.check_may_enter()
        model = session.model
        is_limited = not is_our_own and (needs_device or session.head is not None)
        if is_limited and model.num_pending >= model.limits.max_pending_messages:
            raise queue_full(model)
        model.num_pending += 1
        turn = Turn(session)
        if session.enqueue(turn):
            self.advance(session)
        return turn

    async def finish(self, turn: Turn, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        """Wait for one's turn, and do something with the session alone; once begun, it is done to its end.

        Raises:
            What `work` raises, or what became of the session meanwhile.
        """
        try:
            await asyncio.shield(turn.future)
        except asyncio.CancelledError:
            if not turn.is_begun and not turn.future.done():
                turn.future.cancel()
                is_first = turn.session.head is turn
                self._dequeue(turn, turn.session)
                if is_first:
                    self.advance(turn.session)
            elif turn.is_begun:
                self._leave_turn(turn)
            raise
        return await self.to_the_end(self._do(turn, work))

    async def exclusively(
        self,
        session: Session,
        work: Callable[[Session], Coroutine[Any, Any, T]],
        needs_device: bool = False,
        is_our_own: bool = False,
    ) -> T:
        """As `enter`, and then `finish`."""
        return await self.finish(self.enter(session, needs_device, is_our_own), work)

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something to its end, whatever becomes of who asked for it."""
        return await asyncio.shield(self.spawn(work))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something in the background; what it raises is told to whoever awaits it, and to nobody else."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def _do(self, turn: Turn, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        try:
            result = await work(turn.session)
            if not self._store.holds_lease:
                raise LeaseLapsedError
            return result
        finally:
            self._leave_turn(turn)

    def _leave_turn(self, turn: Turn) -> None:
        self.leave_one(turn, turn.session)
        self.advance(turn.session)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # else asyncio would complain of one that nobody awaits

    # Sessions that leave memory.

    def admit(self, session: Session) -> None:
        """A session is in memory from now on."""
        self.in_memory[session.session_id] = session

    def lose(self, session: Session, loss: ServingError) -> None:
        """A session is in memory no more: what is in its queue is told why, but what runs in the engine ends there."""
        if session.loss is None:
            session.loss = loss
            table, index = session.table, session.index
            table.needs_attention.one[index], table.is_idle.one[index] = True, False
            table.num_lost += 1
            if self.in_memory.get(session.session_id) is session:
                del self.in_memory[session.session_id]
            if self.watching.of:
                self.watching.end(session.session_id, loss)
        self.advance(session)

    def _rest(self, table: SessionTable, indices: int | Rows) -> None:
        """The queues of sessions are empty."""
        if self.wanted:
            indices = np.array(
                [
                    index
                    for index in np.atleast_1d(indices).tolist()
                    if (session := table.session[index]) and session.session_id not in self.wanted
                ],
                np.int64,
            )
        table.set_idle(indices)

    def _dequeue(self, entry: StepRequest | Turn, session: Session) -> None:
        session.dequeue(entry)
        session.model.num_pending -= 1

    def _drop(self, request: StepRequest, session: Session, loss: ServingError) -> None:
        """Take a session that is lost out of a request that is not begun."""
        self._dequeue(request, session)
        if len(request.sessions) == 1:
            request.errors[0] = loss
            request.has_failed = request.is_over = True
            request.reply_to.reply(request)
            return
        row = request.sessions.index(session)
        lost = StepRequest(
            [session],
            request.caller_inputs[row : row + 1],
            None,
            request.reply_to,
            positions=[request.positions[row]],
        )
        lost.errors[0] = loss
        if request.unready is not None:
            request.unready.discard(session)
        request.keep([other for other in range(len(request.sessions)) if other != row])
        request.reply_to.reply(lost)
        if not request.unready:
            self._begin_apart(request)

    def _begin_apart(self, request: StepRequest) -> None:
        """Begin a request outside `advance`, which else goes on with what is behind one that is over at once."""
        self._begin(request)
        if request.is_over:
            for session in request.sessions:
                self.advance(session)


def queue_full(model: ServedModel) -> QueueFullError:
    """Too many requests wait for a model."""
    return QueueFullError(model.model.label, model.limits.max_pending_messages)


def queue_too_slow(model: ServedModel) -> QueueTooSlowError:
    """What waits for a model waits too long."""
    return QueueTooSlowError(model.model.label, model.limits.max_queue_wait_s)
