"""The recorder: what happened in a session since the page opened it, step by step.

A recording begins with the session's exported snapshot, its base, and keeps inputs, outputs and every state after every
step. So any moment of it can be shown, and a fork from it made: by putting the base back as a new session and
running the same inputs there, resets included. The server promises that the same inputs give the same bits, which makes
that exact.

Moment p of a recording of T steps, 0 <= p <= T, is what the session was after p of them; moment 0 is the base.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from inspector.errors import BadRequestError, NotFoundError
from inspector.sequences import Sequence as InputSequence
from ntm import AsyncClient, AsyncSession, StepOrderError, Watched
from ntm.tensor import Array, numpy_dtype
from ntm.v1 import model_pb2, session_pb2

_MOST_NUMBERS_WRITTEN = 1000
"""Of somebody else's inputs, in the Python lines."""
_TRACE_BYTES = 2**24
"""States asked for in one call, about."""


class Recording:
    """A session with its time line, from one moment on."""

    def __init__(self, session: AsyncSession, base: bytes, states: Mapping[str, Array]) -> None:
        """Begin at a session's snapshot, which has these states."""
        self.sequence: InputSequence | None = None
        self.position = 0
        """Steps of the sequence that were sent."""
        self.script: list[str] = []
        """Python that does what was done here."""
        self._sent_from = 0
        self.lock = asyncio.Lock()
        """Held by whoever moves the session."""
        self.begin(session, base, states)

    def begin(self, session: AsyncSession, base: bytes, states: Mapping[str, Array]) -> None:
        """Begin, or begin anew, at a session's snapshot."""
        spec = session.model.spec
        self.recording_id = secrets.token_hex(8)
        """Another recording of the same session has another."""
        self.session = session
        self.first_step = session.next_step
        self.base = base
        self.inputs = _Column(tuple(spec.inputs[0].shape), numpy_dtype(spec.inputs[0].dtype))
        self.outputs = _Column(tuple(spec.outputs[0].shape), numpy_dtype(spec.outputs[0].dtype))
        self.targets = _Column(tuple(spec.outputs[0].shape), np.dtype(np.float32))
        """What the outputs should be; NaN where nobody knows."""
        self.states = {
            name: _Column(array.shape, array.dtype, array[np.newaxis]) for name, array in states.items()
        }
        """At every moment, so one longer than the inputs."""
        self.masks = _Column((), np.dtype(np.bool_))
        """Which steps began from the initial state, by the message that they were in."""
        self.resets: set[int] = set()
        """Moments at which the session was reset, before the step that followed."""

    @property
    def spec(self) -> model_pb2.ModelSpec:
        """The model's spec."""
        return self.session.model.spec

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.inputs)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        columns = (self.inputs, self.outputs, self.targets, *self.states.values())
        return sum(column.num_bytes for column in columns) + len(self.base)

    @property
    def bytes_per_step(self) -> int:
        """Memory that one more step takes."""
        columns = (self.inputs, self.outputs, self.targets, *self.states.values())
        return sum(column.row_bytes for column in columns)

    def check_moment(self, moment: int) -> int:
        """A moment as it was given, if there is one.

        Raises:
            NotFoundError: the recording does not go there.
        """
        if not 0 <= moment <= self.num_steps:
            first, last = self.first_step, self.first_step + self.num_steps
            raise NotFoundError(f"step {self.first_step + moment} is not recorded: {first} to {last} are")
        return moment

    def set_sequence(self, sequence: InputSequence) -> None:
        """Have a sequence to send.

        Raises:
            BadRequestError: the model takes more than one input.
        """
        if len(self.spec.inputs) > 1:
            raise BadRequestError(
                "this model takes several inputs: step the session by a program, and follow it here"
            )
        self.sequence, self.position = sequence, 0
        self.script += ["", *sequence.python.splitlines()]

    def pending(self) -> Array | None:
        """The steps of the sequence that are not sent."""
        return None if self.sequence is None else self.sequence.inputs[self.position :]

    async def advance(self, num_steps: int) -> int:
        """Send the next steps of the sequence; returns how many, fewer when it ends or much would come back at once.

        Raises:
            ClientError: the server refused them, or somebody else has stepped the session.
        """
        pending = self.pending()
        if pending is None:
            raise BadRequestError("there is no sequence to send: choose one first")
        assert self.sequence is not None
        fitting = max(1, _TRACE_BYTES // self.bytes_per_step)
        inputs = pending[: min(num_steps, fitting)]
        if len(inputs) == 0:
            return 0
        trace = await self.session.trace(inputs)
        self.inputs.append(inputs)
        self.outputs.append(_first(trace.outputs))
        self.masks.append(np.zeros(len(inputs), np.bool_))
        self.targets.append(self._due(self.position, len(inputs)))
        for name, column in self.states.items():
            column.append(trace.state[name])
        start, self.position = self.position, self.position + len(inputs)
        self._sent(start, self.position)
        return len(inputs)

    def _due(self, start: int, count: int) -> npt.NDArray[np.float32]:
        """What the outputs of some steps of the sequence should be, NaN where nobody knows."""
        assert self.sequence is not None
        due = np.full((len(self.sequence.inputs), *self.targets.shape), np.nan, np.float32)
        if self.sequence.targets is not None:
            due[len(due) - len(self.sequence.targets) :] = self.sequence.targets
        return due[start : start + count]

    def _sent(self, start: int, stop: int) -> None:
        """Say in Python that steps of the sequence were sent, in one line with those sent just before."""
        if self.script and self.script[-1] == _sent_lines(self._sent_from, start)[-1]:
            del self.script[-2:]
            start = self._sent_from
        self._sent_from = start
        self.script += _sent_lines(start, stop)

    def take(self, told: Watched) -> None:
        """Take over a message that somebody else sent, which follows on what is recorded.

        Of the states only that after its last step is known; those between are NaN, or the last where there is no NaN.
        """
        inputs, outputs = _first(told.inputs), _first(told.outputs)
        self.inputs.append(inputs)
        self.outputs.append(outputs)
        self.targets.append(np.full(outputs.shape, np.nan, np.float32))
        self.masks.append(np.zeros(len(inputs), np.bool_) if told.resets is None else told.resets)
        for name, column in self.states.items():
            rows = np.repeat(told.state[name][np.newaxis], len(inputs), axis=0)
            if rows.dtype.kind == "f":
                rows[:-1] = np.nan
            column.append(rows)
        self.session.next_step = told.next_step
        self.script.append(f"# somebody else sent steps {told.first_step} to {told.next_step - 1}:")
        if inputs.size <= _MOST_NUMBERS_WRITTEN:
            self.script.append(f"recorded.append(np.array({inputs.tolist()}, np.{inputs.dtype.name}))")
        else:
            self.script.append(
                f"# recorded.append(...), their inputs, {list(inputs.shape)} {inputs.dtype.name}"
            )

    async def reset(self) -> None:
        """Put the session back to its model's initial state; the time line goes on.

        The state of this moment becomes the initial one.
        """
        await self.session.reset()
        self.resets.add(self.num_steps)
        states = await self.session.state()
        for name, column in self.states.items():
            column.replace_last(states[name])
        self.script.append("session.reset()")

    def until(self, moment: int, session: AsyncSession) -> Recording:
        """The recording up to a moment, for a fork that was made there."""
        copy = Recording(session, self.base, {name: column.rows()[0] for name, column in self.states.items()})
        copy.first_step = self.first_step
        for name in ("inputs", "outputs", "targets", "masks"):
            getattr(copy, name).append(getattr(self, name).rows()[:moment])
        for name, column in copy.states.items():
            column.append(self.states[name].rows()[1 : moment + 1])
        copy.resets = {reset for reset in self.resets if reset <= moment}
        return copy

    def replay_of(self, moment: int) -> Iterator[tuple[int, int] | None]:
        """What a copy of the base has to run to come to a moment: from which step to which, and None for a reset."""
        start = 0
        for reset in sorted(reset for reset in self.resets if reset <= moment):
            if reset > start:
                yield start, reset
            yield None
            start = reset
        if moment > start:
            yield start, moment


class Recorder:
    """The recordings of the sessions that were opened, as many as there is room for."""

    def __init__(self, client: AsyncClient, connection_lines: Sequence[str], limit_bytes: int) -> None:
        """Record what a client does, which these lines of Python make too, in at most so many bytes of states."""
        self._client = client
        self._connection_lines = connection_lines
        self._limit_bytes = limit_bytes
        self._recordings: dict[str, Recording] = {}
        """By session id; those used last come last."""

    def get(self, session_id: str) -> Recording:
        """The recording of a session that is open.

        Raises:
            NotFoundError: it is not open.
        """
        try:
            recording = self._recordings.pop(session_id)
        except KeyError:
            raise NotFoundError(f"session {session_id!r} is not open here: open it again") from None
        self._recordings[session_id] = recording
        return recording

    def find(self, session_id: str) -> Recording | None:
        """The recording of a session, if it is open."""
        return self._recordings.get(session_id)

    async def create(self, model_name: str, version: int | None = None) -> Recording:
        """Make a session and record it."""
        session = await self._client.session(model_name, version=version)
        recording = await self._begin(session)
        about = f", version={version}" if version is not None else ""
        recording.script += [
            f"session = client.session({model_name!r}{about})",
            "base, recorded = session.export(), []",
        ]
        return recording

    async def open(self, session_id: str) -> Recording:
        """Record a session that exists; one that is recorded goes on, unless somebody else has stepped it."""
        session = await self._client.attach(session_id)
        known = self._recordings.get(session_id)
        if known is not None and known.session.next_step == session.next_step:
            return self.get(session_id)
        recording = await self._begin(session)
        recording.script += [
            f"session = client.attach({session_id!r})",
            "base, recorded = session.export(), []",
        ]
        return recording

    async def import_session(self, snapshot: bytes) -> Recording:
        """Make a session from an exported file and record it."""
        session = await self._client.import_session(snapshot)
        recording = await self._begin(session)
        recording.script += [
            "base = open('session.safetensors', 'rb').read()",
            "session, recorded = client.import_session(base), []",
        ]
        return recording

    async def advance(self, recording: Recording, num_steps: int) -> int:
        """As `Recording.advance`, making room first.

        Raises:
            StepOrderError: somebody else has stepped the session.
        """
        async with recording.lock:
            await self._make_room(recording)
            try:
                return await recording.advance(num_steps)
            except StepOrderError as error:
                raise BadRequestError(
                    "somebody else has stepped this session since: open it again to go on from where it is"
                ) from error

    async def follow(self, recording: Recording) -> AsyncIterator[int]:
        """Record what others do in a session; gives how many of their messages were lost, after each that was not.

        The first comes when following has begun.

        Where some were lost, or somebody reset the session, the time line begins anew.

        Raises:
            ClientError: the session has ended, or cannot be watched any more.
        """
        watch = recording.session.watch(*recording.states)
        try:
            async for told in watch:
                async with recording.lock:
                    is_known = told.next_step <= recording.session.next_step
                    is_own_reset = told.is_reset and recording.num_steps in recording.resets
                    follows = told.first_step == recording.session.next_step and not told.is_reset
                    if is_known and (is_own_reset or not told.is_reset):
                        pass  # it was done here, or is the state that the watch began with
                    elif follows and told.inputs is not None:
                        await self._make_room(recording)
                        if told.first_step == recording.session.next_step:
                            recording.take(told)
                    else:
                        await self._restart(recording)
                yield told.num_lost_messages
        finally:
            await watch.aclose()

    async def fork(self, recording: Recording, moment: int) -> Recording:
        """A new session that is what this one was at a moment, with the time line up to there."""
        async with recording.lock:
            session, lines = await self._fork(recording, recording.check_moment(moment))
            forked = recording.until(moment, session)
        forked.script = [*recording.script, "", *lines, "session = fork"]
        return self._keep(forked)

    async def edit(
        self, recording: Recording, moment: int, name: str, index: tuple[int, ...], value: float
    ) -> Recording:
        """A new session that is what this one was at a moment but for one number of one state."""
        if name not in recording.states:
            raise NotFoundError(f"the model has no state {name!r}")
        column = recording.states[name]
        if len(index) != len(column.shape) or any(
            not 0 <= i < n for i, n in zip(index, column.shape, strict=False)
        ):
            raise NotFoundError(f"state {name!r} of shape {list(column.shape)} has no element {list(index)}")
        if not np.isfinite(value):
            raise BadRequestError("a state holds finite numbers")
        async with recording.lock:
            whole, lines = await self._fork(recording, recording.check_moment(moment))
            snapshot = await whole.export()
            await whole.delete()
        edited = with_state(recording.spec, snapshot, name, index, value)
        forked = await self._begin(await self._client.import_session(edited))
        forked.script = [
            *recording.script,
            "",
            *lines,
            "from inspector.recorder import with_state",
            f"edited = with_state(fork.model.spec, fork.export(), {name!r}, {index!r}, {value!r})",
            "base, recorded, session = edited, [], client.import_session(edited)",
        ]
        return forked

    async def export(self, recording: Recording, moment: int) -> bytes:
        """A session's snapshot at a moment."""
        async with recording.lock:
            if recording.check_moment(moment) == recording.num_steps:
                recording.script.append("open('session.safetensors', 'wb').write(session.export())")
                return await recording.session.export()
            if moment == 0 and 0 not in recording.resets:
                return recording.base
            session, _ = await self._fork(recording, moment)
            snapshot = await session.export()
            await session.delete()
        return snapshot

    async def delete(self, session_id: str) -> None:
        """End a session on the server."""
        await (await self._client.attach(session_id)).delete()
        self._recordings.pop(session_id, None)

    async def sessions(self, model_name: str, limit: int) -> tuple[list[session_pb2.Session], bool]:
        """Sessions of a model, and whether there are more."""
        listed: list[session_pb2.Session] = []
        async for session in self._listed(model_name):
            if len(listed) == limit:
                return listed, True
            listed.append(session)
        return listed, False

    def program(self, recording: Recording) -> str:
        """What was done in a recording, as a Python program."""
        return "\n".join(["import numpy as np", *self._connection_lines, *recording.script]) + "\n"

    def _listed(self, model_name: str) -> AsyncIterator[session_pb2.Session]:
        return self._client.sessions(model_name)

    async def _begin(self, session: AsyncSession) -> Recording:
        base = await session.export()
        return self._keep(Recording(session, base, safetensors.numpy.load(base)))

    def _keep(self, recording: Recording) -> Recording:
        self._recordings.pop(recording.session.session_id, None)
        self._recordings[recording.session.session_id] = recording
        return recording

    async def _make_room(self, growing: Recording) -> None:
        """Forget what was looked at longest ago, and then the past of the recording that grows."""

        def num_bytes() -> int:
            return sum(recording.num_bytes for recording in self._recordings.values())

        for session_id in list(self._recordings):
            if num_bytes() + growing.bytes_per_step <= self._limit_bytes:
                return
            if self._recordings[session_id] is not growing:
                del self._recordings[session_id]
        if num_bytes() + growing.bytes_per_step > self._limit_bytes and growing.num_steps > 0:
            await self._restart(growing)

    async def _restart(self, recording: Recording) -> None:
        """Forget a recording's past, and begin it anew with what its session is now."""
        session = await self._client.attach(recording.session.session_id)
        base = await session.export()
        recording.begin(session, base, safetensors.numpy.load(base))
        recording.script.append("base, recorded = session.export(), []")

    async def _fork(self, recording: Recording, moment: int) -> tuple[AsyncSession, list[str]]:
        """A session that is what another was at a moment, and the lines that make it."""
        if moment == recording.num_steps:
            return await recording.session.fork(), ["fork = session.fork()"]
        if len(recording.spec.inputs) > 1:
            raise BadRequestError(
                "of a model with several inputs only the first is recorded: fork it at its last step"
            )
        session = await self._client.import_session(recording.base)
        lines = ["fork = client.import_session(base)"]
        for part in recording.replay_of(moment):
            if part is None:
                await session.reset()
                lines.append("fork.reset()")
            else:
                masks = recording.masks.rows()[slice(*part)]
                await session.run(recording.inputs.rows()[slice(*part)], masks if masks.any() else None)
                mask = f", resets=np.isin(range({part[0]}, {part[1]}), {(part[0] + np.flatnonzero(masks)).tolist()})"
                lines.append(
                    f"fork.run(np.concatenate(recorded)[{part[0]}:{part[1]}]{mask if masks.any() else ''})"
                )
        return session, lines


def with_state(
    spec: model_pb2.ModelSpec, snapshot: bytes, name: str, index: tuple[int, ...], value: float
) -> bytes:
    """An exported session with one number of one state changed, and its checksum set right."""
    states = {key: np.array(array) for key, array in safetensors.numpy.load(snapshot).items()}
    states[name][index] = value
    length = int.from_bytes(snapshot[:8], "little")
    metadata: dict[str, str] = json.loads(snapshot[8 : 8 + length])["__metadata__"]
    checksum = zlib.crc32(metadata["next_step"].encode())
    for state in spec.states:
        checksum = zlib.crc32(
            states[state.input_name].tobytes(), zlib.crc32(state.input_name.encode(), checksum)
        )
    return safetensors.numpy.save(states, {**metadata, "crc32": f"{checksum:08x}"})


def _sent_lines(start: int, stop: int) -> list[str]:
    """Python that sends steps of the sequence; the slice is written out even where it is the whole."""
    return [
        f"trace = session.trace(inputs[{start}:{stop}])  # outputs, and the states after every step",
        f"recorded.append(inputs[{start}:{stop}])",
    ]


def _first(tensors: Any) -> Array:
    """What is shown of a step's inputs or outputs: of several the first."""
    first: Array = next(iter(tensors.values())) if isinstance(tensors, dict) else tensors
    return first


class _Column:
    """One tensor over time: rows are added at the end, in memory that doubles."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], rows: Array | None = None) -> None:
        self.shape = shape
        self._rows = np.empty((0, *shape), dtype)
        self._count = 0
        if rows is not None:
            self.append(rows)

    def __len__(self) -> int:
        return self._count

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self._rows.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken."""
        return self._rows.nbytes

    def rows(self) -> Array:
        """All rows, [T, ...]."""
        return self._rows[: self._count]

    def append(self, rows: Array) -> None:
        """Add some at the end."""
        end = self._count + len(rows)
        if end > len(self._rows):
            grown = np.empty((max(end, 2 * len(self._rows)), *self.shape), self._rows.dtype)
            grown[: self._count] = self.rows()
            self._rows = grown
        self._rows[self._count : end] = rows
        self._count = end

    def replace_last(self, row: Array) -> None:
        """Put another row in the place of the last."""
        self._rows[self._count - 1] = row
