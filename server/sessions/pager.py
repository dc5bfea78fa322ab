"""Pager: more sessions than fit into memory. The one idle longest is evicted to the store when another needs its index.

One that has something in its queue never is. Without a store that keeps steps, a session is in memory from its
creation to its end.
"""

from __future__ import annotations

import asyncio

import structlog

from server.errors import QueueFullError, ServingError, SessionMovedError
from server.sessions.changes import change_of, commit_change, with_snapshot
from server.sessions.claims import claim_session
from server.sessions.executor import StepExecutor
from server.sessions.request import Turn
from server.sessions.served_model import ServedModel
from server.sessions.session import Session
from server.storage.async_store import AsyncStore
from server.storage.codec import encode_snapshot
from server.storage.interface import Write

log = structlog.get_logger()


class Pager:
    """Gives sessions an index in their model's table, and takes it from those idle longest."""

    def __init__(self, store: AsyncStore, executor: StepExecutor, handover_timeout_s: float) -> None:
        """Nobody waits.

        Args:
            store: where sessions go.
            executor: reads their state.
            handover_timeout_s: seconds to wait for a session that another replica has got hold of meanwhile.
        """
        self._store = store
        self._executor = executor
        self._queues = executor.queues
        self._handover_timeout_s = handover_timeout_s
        self._making_room: set[ServedModel] = set()

    async def take_index(self, served: ServedModel) -> int:
        """An index in a model's table, evicting a session if need be.

        Raises:
            QueueFullError: too many wait already.
        """
        index = served.table.take()
        if index is not None:
            return index
        if served.table.num_waiting >= served.limits.max_pending_messages:
            raise QueueFullError(served.model.label, served.limits.max_pending_messages)
        waiting = served.table.wait_for_index()
        if served not in self._making_room:
            self._making_room.add(served)
            self._queues.spawn(self._make_room(served))
        served.table.became_idle.set()
        return await waiting

    def page_out(self, session: Session) -> asyncio.Task[None]:
        """Begin to take a session out of memory, after what is in its queue, unless more comes in the meantime."""
        turn = self._queues.enter(session, is_our_own=True)
        session.table.begins_to_leave()
        return self._queues.spawn(self._page_out(turn))

    async def _make_room(self, served: ServedModel) -> None:
        table = served.table
        try:
            while table.num_waiting:
                table.became_idle.clear()
                while (session := table.next_to_evict()) is not None:
                    self.page_out(session)
                await table.became_idle.wait()
        finally:
            self._making_room.discard(served)

    async def _page_out(self, turn: Turn) -> None:
        table = turn.session.table
        try:
            await self._queues.finish(turn, self._write_out)
        except ServingError:
            pass  # what became of it is told to whoever calls it
        except Exception as error:
            log.error("a session could not be evicted", session_id=turn.session.session_id, exc_info=error)
        finally:
            table.has_left()

    async def _write_out(self, session: Session) -> None:
        metadata, snapshot = session.metadata, None
        if metadata.snapshot_step != session.next_step:
            state = await self._executor.read_state(session)
            snapshot = encode_snapshot(session.model.model, session.next_step, state)
            metadata = with_snapshot(session, snapshot)
        write = change_of(session, metadata, session.last_use_s, snapshot=snapshot, releases=True)
        await commit_change(self._store, self._queues, session, metadata, write)
        if not session.waiting or session.is_leaving:
            self._queues.lose(session, SessionMovedError(session.session_id))
        else:
            # Something came in the meantime, so it stays.
            session.is_ready = False
            self._queues.spawn(self._take_back(session, write))

    async def _take_back(self, session: Session, written: Write) -> None:
        """Claim a session again that was written out while calls came for it."""
        try:
            claim = await claim_session(self._store, session.session_id, self._handover_timeout_s)
            assert written.entry is not None
            if (claim.entry.next_step, claim.entry.content) != (written.next_step, written.entry.content):
                raise SessionMovedError(session.session_id)  # somebody else has had it
            session.fence = claim.fence
        except ServingError as error:
            self._queues.lose(session, error)
        session.is_ready = True
        self._queues.advance(session)
