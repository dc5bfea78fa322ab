"""Claims: become the owner of a session that is in the store.

One that another live replica owns is asked for until that one has released it.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from server.errors import SessionExpiredError, SessionMovedError, SessionNotFoundError
from server.storage.async_store import AsyncStore
from server.storage.codec import DamagedError, SessionMetadata
from server.storage.interface import Claim, Entry, OwnedElsewhere

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.05


async def claim_session(store: AsyncStore, session_id: str, handover_timeout_s: float) -> Claim:
    """Own a session, in place of another replica if need be.

    Raises:
        SessionNotFoundError, SessionExpiredError: it does not live. SessionMovedError: its owner did not release it in
        time. StoreError, LeaseLapsedError.
    """
    has_asked = False
    deadline_s, pause_s = monotonic() + handover_timeout_s, _FIRST_PAUSE_S
    while True:
        (found,) = await store.claim([session_id])
        if not isinstance(found, OwnedElsewhere):
            if has_asked and isinstance(found, Claim) and not found.is_from_dead:
                store.note_hand_over()
            return check_lives(session_id, found)
        if monotonic() > deadline_s:
            raise SessionMovedError(session_id)
        await store.ask_for(session_id, found.owner)
        has_asked = True
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def check_lives(session_id: str, found: Claim | Entry | None) -> Claim:
    """That what a claim gave is a living session.

    Raises:
        SessionNotFoundError, SessionExpiredError: it is not.
    """
    if found is None:
        raise SessionNotFoundError(session_id)
    if isinstance(found, Entry):
        raise end_error(found)
    return found


def end_error(entry: Entry) -> SessionNotFoundError:
    """What callers of a session that has ended are told."""
    try:
        has_expired = SessionMetadata.decode(entry.content).end_reason == "EXPIRED"
    except DamagedError:
        has_expired = False
    return (SessionExpiredError if has_expired else SessionNotFoundError)(entry.session_id)
