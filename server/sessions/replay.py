"""Replay: bring a session's state back from what the store has of it.

Its snapshot is put into a slot, and the records since are replayed as a request of the engine like any other, so that
many sessions come back at once. The outputs must then be those on record, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import structlog

from ntm.tensor import Array
from server.errors import (
    EngineFailedError,
    RecoveryError,
    RecoveryNotExactError,
    ServingError,
    SessionCorruptError,
    SessionQuarantinedError,
    StoreFullError,
    StoreUnavailableError,
)
from server.runtime.runner import INITIAL_SLOT
from server.sessions.changes import change_of, commit_change, with_snapshot
from server.sessions.queues import SessionQueues
from server.sessions.request import EngineCall
from server.sessions.session import Session
from server.storage.async_store import AsyncStore
from server.storage.codec import (
    DamagedError,
    RecordedSteps,
    check_unbroken,
    decode_initial_state,
    decode_record,
    decode_snapshot,
    encode_snapshot,
)
from server.storage.interface import Claim

log = structlog.get_logger()

_MOST_RECOVERIES = 3


class Replay:
    """Brings states back."""

    def __init__(
        self, store: AsyncStore, queues: SessionQueues, recovery: Literal["exact", "approximate"]
    ) -> None:
        """Nothing is under way.

        Args:
            store: where sessions are kept.
            queues: their queues.
            recovery: whether a session may be replayed on another machine or build than it ran on.
        """
        self._store = store
        self._queues = queues
        self._recovery = recovery
        self.under_way: set[asyncio.Task[None]] = set()

    def begin(self, session: Session, claim: Claim) -> None:
        """Begin to bring back the state of a session that is in memory; its queue waits for it.

        Raises:
            RecoveryError: what the store has cannot be used.
        """
        replay, state = self._read_claim(session, claim)
        if replay or state is not None or session.metadata.initial_state:
            self.restore(session, replay, state)

    def restore(self, session: Session, replay: list[RecordedSteps], state: dict[str, Array] | None) -> None:
        """Begin to put a state into a session's slot, and to replay what came after it."""
        session.is_ready = False
        task = self._queues.spawn(self._restore(session, replay, state))
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    def _read_claim(
        self, session: Session, claim: Claim
    ) -> tuple[list[RecordedSteps], dict[str, Array] | None]:
        """What is to be replayed, and from which state (None: the initial one); fills the retry window."""
        model, metadata = session.model.model, session.metadata
        try:
            recorded = [decode_record(session.session_id, record, model) for record in claim.records]
            check_unbroken(recorded, metadata.snapshot_step, claim.entry.next_step)
            metadata.check_snapshot(claim.snapshot)
            # Before the session is in memory: one that is lost as soon as it is there would be looked for again.
            decode_initial_state(metadata.initial_state, model)
            state = None
            if claim.snapshot:
                snapshot = decode_snapshot(model, claim.snapshot)
                if (snapshot.next_step, snapshot.metadata["model_digest"]) != (
                    metadata.snapshot_step,
                    model.digest,
                ):
                    raise DamagedError("the snapshot is of another step or model")
                state = snapshot.state
        except DamagedError as error:
            log.error("a session is damaged", session_id=session.session_id, problem=str(error))
            raise SessionCorruptError(session.session_id, str(error)) from error
        replay = [steps for steps in recorded if steps.first_step >= metadata.snapshot_step]
        where = session.model.fingerprint
        if any(steps.fingerprint != where.digest for steps in replay):
            if self._recovery == "exact":
                raise RecoveryNotExactError(session.session_id, metadata.fingerprint, where.text)
            session.metadata = replace(metadata, is_approximate=True)
        if replay and metadata.num_recoveries >= _MOST_RECOVERIES:
            raise SessionQuarantinedError(session.session_id, metadata.num_recoveries)
        _record(session, recorded)
        return replay, state

    async def _restore(
        self, session: Session, replay: list[RecordedSteps], state: dict[str, Array] | None
    ) -> None:
        """Put the state back, replay what came after it, and let the session's queue go on."""
        try:
            if replay:
                await self._note_attempt(session)
            call = await self._run(session, replay, state)
            if replay:
                await self._note_recovery(session, call)
        except ServingError as error:
            if isinstance(error, RecoveryError):
                log.error(
                    "a session cannot be brought back", session_id=session.session_id, problem=str(error)
                )
            self._queues.lose(session, error)
        except Exception as error:  # nobody is left waiting
            log.error("a session could not be brought back", session_id=session.session_id, exc_info=error)
            self._queues.lose(session, EngineFailedError(session.model.model.label))
        session.is_ready = True
        self._queues.advance(session)

    async def _run(
        self, session: Session, replay: list[RecordedSteps], state: dict[str, Array] | None
    ) -> EngineCall:
        served, model = session.model, session.model.model
        inputs = np.concatenate([model.inputs.none(0), *(steps.inputs for steps in replay)])
        if session.metadata.initial_state and session.initial_slot == INITIAL_SLOT:
            await self._load_initial_state(session)
        source = served.slots.hold(session.initial_slot) if state is None else served.slots.take()
        target = served.slots.take() if replay else source
        call = EngineCall(
            [session.session_id],
            (session.next_step - len(inputs),),
            inputs[np.newaxis],
            (source,),
            (target,),
            load_state=None if state is None else {name: a[np.newaxis] for name, a in state.items()},
            reads_state=bool(replay),
        )
        call.initial_slots = (session.initial_slot,)
        await served.run(call)
        if replay:
            served.slots.release(source)
        if session.loss:
            served.slots.release(target)
            raise session.loss
        session.move_to(target)
        if call.errors:
            error = call.errors[0]
            if isinstance(error, EngineFailedError):
                raise error
            raise SessionCorruptError(session.session_id, f"its steps cannot be run again: {error}")
        if replay and not session.metadata.is_approximate:
            assert call.outputs is not None
            recorded = b"".join(steps.outputs.tobytes() for steps in replay)
            if recorded != call.outputs.tobytes():
                raise SessionCorruptError(session.session_id, "its steps, run again, gave other outputs")
        return call

    async def _load_initial_state(self, session: Session) -> None:
        """Put the state that a session began from into a slot that it holds from now on."""
        served = session.model
        state = decode_initial_state(session.metadata.initial_state, served.model)
        slot = served.slots.take()
        call = EngineCall(
            [session.session_id],
            (session.next_step,),
            served.model.inputs.none(1, 0),
            (slot,),
            (slot,),
            load_state={name: value[np.newaxis] for name, value in state.items()},
        )
        await served.run(call)
        if session.loss or call.errors:
            served.slots.release(slot)
            raise session.loss or call.errors[0]
        session.initial_slot = slot

    async def _note_attempt(self, session: Session) -> None:
        metadata = replace(session.metadata, num_recoveries=session.metadata.num_recoveries + 1)
        write = change_of(session, metadata, session.last_use_s)
        await commit_change(self._store, self._queues, session, metadata, write)

    async def _note_recovery(self, session: Session, call: EngineCall) -> None:
        """What was replayed once need not be again."""
        assert call.state is not None
        state = {name: values[0] for name, values in call.state.items()}
        snapshot = encode_snapshot(session.model.model, session.next_step, state)
        metadata = with_snapshot(session, snapshot)
        write = change_of(session, metadata, session.last_use_s, snapshot=snapshot)
        try:
            await commit_change(self._store, self._queues, session, metadata, write)
        except StoreFullError:
            # The replay was sound: nobody is to be quarantined because a store has no room.
            sound = replace(session.metadata, num_recoveries=0)
            await self._store.commit_one(change_of(session, sound, session.last_use_s))
            raise
        except StoreUnavailableError:
            # Nor because it did not answer. It may have the snapshot, and what is said of it must stay true: all again.
            await self._store.commit_one(write)
            raise


def _record(session: Session, recorded: Sequence[RecordedSteps]) -> None:
    """Fill a session's retry window, with as many of its last steps as it has."""
    served, model = session.model, session.model.model
    window = served.limits.retry_window_steps
    inputs = np.concatenate([model.inputs.none(0), *(steps.inputs for steps in recorded)])[-window:]
    outputs = np.concatenate([model.outputs.none(0), *(steps.outputs for steps in recorded)])[-window:]
    windows = session.table.retry_windows
    windows.begin(session.index, session.next_step - len(inputs), session.metadata.reset_steps)
    windows.add(session.index, inputs, outputs)
