"""Info: a session as callers are told of it, in memory or in the store."""

from __future__ import annotations

from dataclasses import dataclass

from server.sessions.queues import SessionQueues
from server.sessions.session import Session
from server.storage.async_store import AsyncStore
from server.storage.codec import DamagedError, SessionMetadata
from server.storage.interface import Entry


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as callers are told of it; times in seconds since the epoch."""

    session_id: str
    model_name: str
    model_version: int
    next_step: int
    create_time_s: float
    last_use_time_s: float
    expire_time_s: float | None
    is_approximate: bool


class SessionInfos:
    """Describes sessions."""

    def __init__(self, store: AsyncStore, queues: SessionQueues, idle_limit_s: float | None) -> None:
        """Times are the store's; sessions without a call for the idle limit end, if there is one."""
        self._store = store
        self._queues = queues
        self._idle_limit_s = idle_limit_s

    def of(self, session: Session) -> SessionInfo:
        """A session in memory as it is."""
        return self._info(
            session.session_id,
            session.model.model.name,
            session.next_step,
            session.last_use_s,
            session.metadata,
        )

    def of_entry(self, entry: Entry) -> SessionInfo:
        """A session as its entry in the store says, or as it is, if it is in memory."""
        session = self._queues.in_memory.get(entry.session_id)
        if session is not None:
            return self.of(session)
        try:
            metadata = SessionMetadata.decode(entry.content)
        except DamagedError:
            metadata = SessionMetadata("", 0, "", 0.0, 0)
        return self._info(entry.session_id, entry.model_name, entry.next_step, entry.last_use_s, metadata)

    def _info(
        self,
        session_id: str,
        model_name: str,
        next_step: int,
        last_use_s: float,
        metadata: SessionMetadata,
    ) -> SessionInfo:
        last_use_time_s = self._store.time_s - (self._store.service_time_s - last_use_s)
        return SessionInfo(
            session_id,
            model_name,
            metadata.model_version,
            next_step,
            metadata.create_time_s,
            last_use_time_s,
            last_use_time_s + self._idle_limit_s if self._idle_limit_s else None,
            metadata.is_approximate,
        )
