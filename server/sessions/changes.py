"""Changes: what becomes of one session without a step is committed before it is so.

For whoever has the session's turn, or brings it back.
"""

from __future__ import annotations

from server.errors import ServingError, SessionMovedError
from server.sessions.queues import SessionQueues
from server.sessions.session import Session
from server.storage.async_store import AsyncStore
from server.storage.codec import SessionMetadata
from server.storage.commit_writer import Outcome
from server.storage.interface import Write


def change_of(
    session: Session,
    metadata: SessionMetadata,
    last_use_s: float,
    snapshot: bytes | None = None,
    end_time_s: float | None = None,
    releases: bool = False,
) -> Write:
    """A change of a session that runs no step, for the store."""
    forget_before = None
    if snapshot is not None:
        forget_before = max(0, session.next_step - session.model.limits.retry_window_steps)
    return Write(
        session.session_id,
        session.fence,
        session.next_step,
        last_use_s,
        entry=session.entry(metadata, session.next_step, last_use_s, end_time_s),
        snapshot=snapshot,
        forget_before=forget_before,
        releases=releases,
    )


async def commit_change(
    store: AsyncStore, queues: SessionQueues, session: Session, metadata: SessionMetadata, write: Write
) -> None:
    """Commit a change of a session, and let its metadata be what they are then.

    Raises:
        StoreError, SessionMovedError or what else became of the session: it is in memory no more.
    """
    outcome = await store.commit_one(write)
    if outcome is not None:
        queues.lose(session, loss_by(outcome, session.session_id))
    if session.loss is not None:
        raise session.loss
    session.metadata, session.last_use_s = metadata, write.last_use_s


def with_snapshot(session: Session, snapshot: bytes) -> SessionMetadata:
    """What is to be said of a session whose present state is written as its snapshot."""
    resets = session.table.retry_windows.reset_steps(session.index)
    return session.metadata.with_snapshot(snapshot, session.next_step, resets, session.model.fingerprint)


def loss_by(outcome: Outcome, session_id: str) -> ServingError:
    """What callers are told of a change that was not committed."""
    return outcome if isinstance(outcome, ServingError) else SessionMovedError(session_id)
