"""Creation: how sessions begin, each named by a request id, so that a repeat gets what the first one made.

A session is created in the model's initial state, forked from another, or imported from a snapshot.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ntm.tensor import Array
from server.errors import (
    InvalidInputError,
    ModelLeavingError,
    ModelMismatchError,
    ModelNotFoundError,
    NoFreeSlotError,
    RequestIdReusedError,
    ServingError,
    SessionExistsError,
    SessionIdRetiredError,
    SessionMovedError,
    StepOrderError,
)
from server.model import spec
from server.runtime.runner import INITIAL_SLOT
from server.sessions.executor import StepExecutor
from server.sessions.info import SessionInfo, SessionInfos
from server.sessions.models import ServedModels
from server.sessions.ownership import Ownership
from server.sessions.replay import Replay
from server.sessions.served_model import ServedModel
from server.sessions.session import Session
from server.storage.async_store import AsyncStore
from server.storage.codec import (
    DamagedError,
    SessionMetadata,
    Snapshot,
    decode_snapshot,
    encode_initial_state,
    encode_snapshot,
    snapshot_metadata,
)
from server.storage.interface import FIRST_FENCE, NEW, Entry, EntryExists, RequestExists, Write


class Creation:
    """Makes sessions."""

    def __init__(
        self,
        store: AsyncStore,
        models: ServedModels,
        executor: StepExecutor,
        ownership: Ownership,
        replay: Replay,
        infos: SessionInfos,
    ) -> None:
        """Nothing is made yet."""
        self._store = store
        self._models = models
        self._executor = executor
        self._queues = executor.queues
        self._ownership = ownership
        self._replay = replay
        self._infos = infos

    async def create(
        self,
        model_name: str,
        version: int | None,
        session_id: str,
        request_id: str,
        initial_state: Mapping[str, Array] | None = None,
    ) -> SessionInfo:
        """Create a session in the initial state, or return the one that this request made before.

        Args:
            model_name: name of the model.
            version: version of the model, or None for the newest.
            session_id: id of the session, or "" to have one made.
            request_id: names the request, or "".
            initial_state: by name, in the API's axes, what it begins from instead of the model's own values.

        Raises:
            InvalidInputError: `initial_state` does not fit the model. ModelNotFoundError, ModelLeavingError,
            SessionExistsError, SessionIdRetiredError, RequestIdReusedError, NoFreeSlotError, StoreError.
        """
        given = initial_state or {}
        request = _request("create", model_name, version, session_id, *_digests(given))
        try:
            served = self._models.find(model_name, version)
            metadata = SessionMetadata(
                request,
                served.model.version,
                served.model.digest,
                self._store.time_s,
                0,
                initial_state=encode_initial_state(spec.initial_state(served.model.spec, given)),
            )
            return await self._queues.to_the_end(self._add(served, session_id, request_id, metadata, 0))
        except (ModelNotFoundError, ModelLeavingError):
            # The model may have gone since this request was made for the first time.
            if repeated := await self._repeated(request_id, request):
                return repeated
            raise

    async def fork(
        self, source_session_id: str, at_step: int | None, session_id: str, request_id: str
    ) -> SessionInfo:
        """Copy a session as it is when its turn comes; both hold the same slot until one of them steps.

        Raises:
            As `create`, and what becomes of the source.
        """
        request = _request("fork", source_session_id, at_step, session_id)

        async def copy(source: Session) -> SessionInfo:
            if at_step is not None:
                source.table.retry_windows.check_is_at(source.index, at_step)
            snapshot = b""
            if self._store.backend.keeps_steps:
                state = await self._executor.read_state(source)
                snapshot = encode_snapshot(source.model.model, source.next_step, state)
            metadata = replace(
                source.metadata,
                request=request,
                create_time_s=self._store.time_s,
                snapshot_step=source.next_step,
                snapshot_checksum=zlib.crc32(snapshot),
                reset_steps=(),
                num_recoveries=0,
                failure=None,
            )
            return await self._add(
                source.model,
                session_id,
                request_id,
                metadata,
                source.next_step,
                snapshot,
                source.slot,
                source.initial_slot,
            )

        if repeated := await self._repeated(request_id, request):
            return repeated
        try:
            return await self._queues.exclusively(await self._ownership.find(source_session_id), copy)
        except StepOrderError:
            # The first of two may have waited in this queue before the second, and the source has moved on since.
            if repeated := await self._repeated(request_id, request):
                return repeated
            raise

    async def import_snapshot(self, data: bytes, session_id: str, request_id: str) -> SessionInfo:
        """Make a session from what an export gave.

        Raises:
            As `create`; InvalidInputError: it is damaged or no state of its model. ModelMismatchError: it comes from
            another model file.
        """
        request = _request("import", hashlib.sha256(data).hexdigest(), session_id)
        if repeated := await self._repeated(request_id, request):
            return repeated
        served, snapshot = self._read_snapshot(data)
        if self._store.backend.keeps_steps:
            data = encode_snapshot(served.model, snapshot.next_step, snapshot.state)
        metadata = SessionMetadata(
            request,
            served.model.version,
            served.model.digest,
            self._store.time_s,
            snapshot.next_step,
            zlib.crc32(data),
            initial_state=snapshot.initial_state,
        )
        return await self._queues.to_the_end(
            self._add(
                served, session_id, request_id, metadata, snapshot.next_step, data, state=snapshot.state
            )
        )

    def _read_snapshot(self, data: bytes) -> tuple[ServedModel, Snapshot]:
        try:
            metadata = snapshot_metadata(data)
            name, digest = metadata["model_name"], metadata["model_digest"]
            served, alike = self._models.find_alike(name, int(metadata["model_version"]), digest)
            if not alike:
                raise ModelMismatchError(f"{name}/{metadata['model_version']}", digest, served.model.digest)
            snapshot = decode_snapshot(alike[0].model, data)
        except (DamagedError, ValueError) as error:
            raise InvalidInputError(
                "snapshot", f"{error}: send what ExportSession gave, unchanged"
            ) from error
        for tensor, array in snapshot.state.items():
            if not np.isfinite(array).all():
                raise InvalidInputError("snapshot", f"tensor {tensor!r} has values that are not finite")
        return alike[0], snapshot

    async def _add(
        self,
        served: ServedModel,
        session_id: str,
        request_id: str,
        metadata: SessionMetadata,
        next_step: int,
        snapshot: bytes = b"",
        slot: int = INITIAL_SLOT,
        initial_slot: int = INITIAL_SLOT,
        state: dict[str, Array] | None = None,
    ) -> SessionInfo:
        """Make a session, in memory if there is room; a repeat of its request gets what that made."""
        if served.is_draining:
            raise ModelLeavingError(served.model.label)
        if not session_id or session_id.endswith("/"):  # an owner's, without an id
            session_id += secrets.token_hex(16)
        keeps_steps = self._store.backend.keeps_steps
        # With a store, a state comes into memory as that of any other session does, by its first call.
        is_to_be_loaded = state is not None or (metadata.initial_state and initial_slot == INITIAL_SLOT)
        index = None if is_to_be_loaded and keeps_steps else served.table.take()
        if index is None and not keeps_steps:
            if repeated := await self._repeated(request_id, metadata.request):
                return repeated
            raise NoFreeSlotError(served.model.label, served.limits.max_resident_sessions)
        last_use_s = self._store.service_time_s
        entry = Entry(session_id, served.model.name, request_id, next_step, last_use_s, metadata.encode())
        write = Write(
            session_id,
            NEW,
            next_step,
            last_use_s,
            entry=entry,
            snapshot=snapshot if keeps_steps else b"",
            releases=index is None,
        )
        held = INITIAL_SLOT if index is None else served.slots.hold(slot)
        outcome = await self._store.commit_one(write)
        if outcome is not None:
            if index is not None:
                served.slots.release(held)
                served.table.give_up(index)
            return await self._already(outcome, session_id, request_id, metadata.request)
        if index is None:
            return self._infos.of_entry(entry)
        session = Session(
            session_id, request_id, served, index, metadata, FIRST_FENCE, next_step, last_use_s, held
        )
        session.initial_slot = served.slots.hold(initial_slot)
        self._queues.admit(session)
        if is_to_be_loaded:
            self._replay.restore(session, [], state)
        self._queues.advance(session)
        return self._infos.of(session)

    async def _already(self, outcome: object, session_id: str, request_id: str, request: str) -> SessionInfo:
        """The answer to a creation that the store did not make."""
        if isinstance(outcome, RequestExists):
            return self._same(outcome.entry, request_id, request)
        if isinstance(outcome, EntryExists):
            has_ended = outcome.entry.end_time_s is not None
            raise (SessionIdRetiredError if has_ended else SessionExistsError)(session_id)
        if isinstance(outcome, ServingError):
            raise outcome
        raise SessionMovedError(session_id)

    async def _repeated(self, request_id: str, request: str) -> SessionInfo | None:
        """The session that this request made before, if it did."""
        entry = await self._store.find_request(request_id) if request_id else None
        return None if entry is None else self._same(entry, request_id, request)

    def _same(self, entry: Entry, request_id: str, request: str) -> SessionInfo:
        """The session that a request made, if it is the same request."""
        try:
            first_request = SessionMetadata.decode(entry.content).request
        except DamagedError:
            first_request = ""
        if first_request != request:
            raise RequestIdReusedError(request_id)
        if entry.end_time_s is not None:
            raise SessionIdRetiredError(entry.session_id)
        return self._infos.of_entry(entry)


def _digests(given: Mapping[str, Array]) -> list[str]:
    """Tells the values of one request from those of another; nothing for none."""
    if not given:
        return []
    parts = [
        f"{name} {given[name].dtype} {given[name].shape} ".encode() + given[name].tobytes()
        for name in sorted(given)
    ]
    return [hashlib.sha256(b"".join(parts)).hexdigest()]


def _request(*said: object) -> str:
    """A request that makes a session, so that a repeat is told from another request."""
    return json.dumps(said)
