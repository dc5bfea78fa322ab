"""Any mix of calls, on many sessions and few slots, through restarts and crashes: each answer right to the bit.

Hypothesis makes the mixes, a real server answers, and `oracle.py` says what it must answer. Two sessions of each
model fit in memory, so almost every call brings one in and sends another out. `python -m tests.chaos` runs many more.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ntm.tensor import to_array, to_message
from ntm.v1 import session_service_pb2 as pb
from server.launch import build
from server.settings import ServerSettings
from server.storage.async_store import AsyncStore
from tests import step_models
from tests.reliability.helpers import reason_of, tried
from tests.reliability.oracle import FIRST_ROW_THAT_FAILS, MODELS, Known, State, random_inputs
from tests.server.helpers import Caller
from tests.server.sessions.test_recovery import crash
from tests.valkey import ValkeyServer

T = TypeVar("T")

WINDOW = 12
MOST_STEPS = 5
MOST_SESSIONS = 9
IDLE_LIMIT_S = 3600.0

sessions = st.integers(0, MOST_SESSIONS - 1)
seeds = st.integers(0, 2**16)
sizes = st.integers(1, MOST_STEPS)
kinds = st.sampled_from(["new", "unnumbered", "repeat", "recut", "changed", "gap", "failing", "twins"])


class Clock:
    """How far the stores' clocks are ahead of themselves: idle limits pass in no time."""

    ahead_s = 0.0


def same(answer: Any, expected: np.ndarray | str) -> bool:
    if isinstance(expected, str) or isinstance(answer, str):
        return bool(answer == expected) if isinstance(answer, str) and isinstance(expected, str) else False
    return to_array(answer.outputs).tobytes() == expected.tobytes()


class RetryWindows(RuleBasedStateMachine):
    """Sessions on a real server, and what each of them must be."""

    def __init__(self, store: str, models: Path) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)  # grpc.aio looks for it when a call is made outside of it
        self.store = store
        self.models = models
        self.living: dict[str, Known] = {}
        self.ended: dict[str, tuple[str, Known]] = {}
        """Why, and what they were."""
        self.num_made = 0
        self.keeps_steps = store != "none"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    @initialize()
    def start(self) -> None:
        self.run(self._start())

    async def _start(self) -> None:
        self.server = await build(
            ServerSettings(
                models=self.models,
                listen="127.0.0.1:0",
                device="cpu",
                store=self.store,
                sync="normal",
                lease_s=30,
                handover_timeout_s=31,
                snapshot_every_steps=7,
                max_resident_sessions=2 if self.keeps_steps else 4 * MOST_SESSIONS,
                max_batch_size=4,
                max_steps_per_message=WINDOW,
                retry_window_steps=WINDOW,
                idle_limit_s=IDLE_LIMIT_S,
                drain_timeout_s=0.5,
            )
        )
        port = await self.server.start()
        self.caller = Caller(self.server, f"127.0.0.1:{port}")
        self.stub = self.caller.stub

    def teardown(self) -> None:
        if hasattr(self, "caller"):
            try:
                self.run(self._check_everything())
            finally:
                self.run(self._stop(self.server.stop()))
        asyncio.set_event_loop(None)
        self.loop.close()

    async def _stop(self, stopping: Awaitable[None]) -> None:
        await self.caller.channel.close()
        await stopping

    # What there is to choose from.

    def pick(self, index: int) -> tuple[str, Known]:
        ids = sorted(self.living)
        session_id = ids[index % len(ids)]
        return session_id, self.living[session_id]

    def new_id(self) -> str:
        self.num_made += 1
        return f"s{self.num_made:04}"

    def message(self, known: Known, kind: str, size: int, seed: int) -> tuple[np.ndarray, int | None]:
        """Inputs and first step of a message of some kind."""
        inputs = random_inputs(size, seed)
        if kind == "unnumbered":
            return inputs, None
        if kind == "gap":
            return inputs, known.next_step + 1 + seed % 3
        if kind == "failing":
            inputs[seed % size, 0] = FIRST_ROW_THAT_FAILS + seed % 5
            return inputs, known.next_step
        if kind in ("repeat", "recut", "changed"):
            # From far enough back to be too old, sometimes.
            first_step = max(known.first_step, known.next_step - 1 - seed % (WINDOW + 2))
            repeated = known.recorded_inputs(first_step)
            if kind != "repeat":
                repeated = np.concatenate([repeated, inputs])
            repeated = repeated[: WINDOW if kind == "recut" else size].copy()
            if not len(repeated):
                return inputs, known.next_step
            if kind == "changed":
                repeated[seed % len(repeated), 1] += 1
            return repeated, first_step
        return inputs, known.next_step

    def send(self, session_id: str, inputs: np.ndarray, first_step: int | None, **options: Any) -> Any:
        request = pb.StepRequest(session_id=session_id, inputs=to_message(inputs), first_step=first_step)
        return self.stub.Step(request, **options)

    # Rules.

    @precondition(lambda self: len(self.living) < MOST_SESSIONS)
    @rule(model=st.sampled_from([*MODELS, "accumulator"]), has_request=st.booleans())
    def create(self, model: str, has_request: bool) -> None:
        session_id = self.new_id()
        request_id = f"r-{session_id}" if has_request else ""
        known = Known(model, WINDOW)
        known.request = {"model_name": model, "session_id": session_id, "request_id": request_id}
        answer = self.run(tried(self.stub.CreateSession(pb.CreateSessionRequest(**known.request))))
        assert not isinstance(answer, str), answer
        assert answer.session.next_step == 0
        self.living[session_id] = known

    @precondition(lambda self: self.living or self.ended)
    @rule(index=sessions, seed=seeds)
    def create_again(self, index: int, seed: int) -> None:
        """A repeat of what made a session, or the same id under another request."""
        everybody = self.living | {session_id: known for session_id, (_, known) in self.ended.items()}
        session_id = sorted(everybody)[(index + seed) % len(everybody)]
        known = everybody[session_id]
        if "model_name" not in known.request:
            return
        answer = self.run(tried(self.stub.CreateSession(pb.CreateSessionRequest(**known.request))))
        if session_id in self.ended:
            assert answer == "SESSION_ID_RETIRED"
        elif known.request["request_id"]:
            assert not isinstance(answer, str), answer
            assert answer.session.next_step == known.next_step
        else:
            assert answer == "SESSION_EXISTS"

    @precondition(lambda self: self.living)
    @rule(index=sessions, kind=kinds, size=sizes, seed=seeds)
    def step(self, index: int, kind: str, size: int, seed: int) -> None:
        session_id, known = self.pick(index)
        inputs, first_step = self.message(known, kind, size, seed)
        sends = 2 if kind == "twins" else 1
        expected = known.step(inputs, first_step)

        async def send() -> list[Any]:
            return await asyncio.gather(
                *(tried(self.send(session_id, inputs, first_step)) for _ in range(sends))
            )

        for answer in self.run(send()):
            assert same(answer, expected), (answer, expected)

    @precondition(lambda self: self.living)
    @rule(
        plans=st.lists(
            st.tuples(sessions, st.one_of(kinds, st.just("look")), st.integers(1, WINDOW), seeds),
            min_size=2,
            max_size=20,
        )
    )
    def many_at_once(self, plans: list[tuple[int, str, int, int]]) -> None:
        """Each session's messages one after another, of all sessions at the same time."""
        lines: dict[str, list[tuple[np.ndarray | State, int | None, np.ndarray | str]]] = {}
        for index, kind, size, seed in plans:
            session_id, known = self.pick(index)
            line = lines.setdefault(session_id, [])
            if kind == "look":
                line.append((known.state, None, ""))
                continue
            inputs, first_step = self.message(known, kind, size, seed)
            line.append((inputs, first_step, known.step(inputs, first_step)))

        async def drive(session_id: str) -> None:
            for asked, first_step, expected in lines[session_id]:
                if isinstance(asked, dict):
                    state = await self.caller.state(session_id)
                    assert {name: array.tobytes() for name, array in state.items()} == {
                        name: array.tobytes() for name, array in asked.items()
                    }
                    continue
                answer = await tried(self.send(session_id, asked, first_step))
                assert same(answer, expected), (session_id, answer, expected)

        async def drive_all() -> None:
            await asyncio.gather(*map(drive, lines))

        self.run(drive_all())

    @precondition(lambda self: self.living)
    @rule(chosen=st.sets(sessions, min_size=1), kind=kinds, size=sizes, seed=seeds)
    def batch(self, chosen: set[int], kind: str, size: int, seed: int) -> None:
        """Sessions of every model, some at the steps they are at, some elsewhere, one that never was."""
        ids = sorted({self.pick(index)[0] for index in chosen})
        inputs, first_steps, expected = [], [], []
        for offset, session_id in enumerate(ids):
            known = self.living[session_id]
            of_session, first_step = self.message(known, kind if offset % 2 else "new", size, seed + offset)
            of_session = np.concatenate([of_session, random_inputs(size, seed)])[:size]
            first_step = known.next_step if first_step is None else first_step
            inputs.append(of_session)
            first_steps.append(first_step)
            expected.append(known.step(of_session, first_step))
        request = pb.BatchStepRequest(
            session_ids=[*ids, "nobody"],
            first_steps=[*first_steps, 0],
            inputs=to_message(np.stack([*inputs, random_inputs(size, 0)])),
        )

        answer = self.run(tried(self.stub.BatchStep(request)))

        assert not isinstance(answer, str), answer
        errors = {error.index: error.reason for error in answer.errors}
        assert errors.pop(len(ids)) == "SESSION_NOT_FOUND"
        outputs = to_array(answer.outputs) if answer.outputs.shape else None
        for row, wanted in enumerate(expected):
            if isinstance(wanted, str):
                assert errors.pop(row) == wanted
            else:
                assert outputs is not None
                assert outputs[row].tobytes() == wanted.tobytes()
        assert not errors

    @precondition(lambda self: self.living)
    @rule(plans=st.lists(st.tuples(sessions, kinds, sizes, seeds), min_size=1, max_size=6))
    def stream(self, plans: list[tuple[int, str, int, int]]) -> None:
        """Messages for several sessions; the first that is refused ends it, and those behind it are not run."""
        requests, expected = [], []
        for index, kind, size, seed in plans:
            session_id, known = self.pick(index)
            inputs, first_step = self.message(known, kind, size, seed)
            step = pb.StepRequest(session_id=session_id, inputs=to_message(inputs), first_step=first_step)
            requests.append(pb.StreamStepsRequest(step=step))
            if not expected or not isinstance(expected[-1], str):
                expected.append(known.step(inputs, first_step))

        async def read() -> list[Any]:
            answers: list[Any] = []
            try:
                async for answer in self.stub.StreamSteps(_each(requests)):
                    answers.append(answer.step)
            except grpc.aio.AioRpcError as error:
                answers.append(reason_of(error))
            return answers

        answers = self.run(read())

        assert len(answers) == len(expected)
        for answer, wanted in zip(answers, expected, strict=True):
            # grpc.aio puts INTERNAL in the place of a status that arrives while it still sends.
            is_hidden = answer == "INTERNAL" and isinstance(wanted, str)
            assert is_hidden or same(answer, wanted), (answer, wanted)

    @precondition(lambda self: self.living)
    @rule(index=sessions, size=sizes, seed=seeds, num_turns=st.integers(0, 200), is_numbered=st.booleans())
    def cancel(self, index: int, size: int, seed: int, num_turns: int, is_numbered: bool) -> None:
        """A message that is cancelled, sooner or later, was run whole or not at all."""
        session_id, known = self.pick(index)
        inputs = random_inputs(size, seed)

        async def send_and_cancel() -> None:
            call = self.send(session_id, inputs, known.next_step if is_numbered else None)
            for _ in range(num_turns):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await call

        self.run(send_and_cancel())
        self.run(self._settle(session_id, known, inputs))

    @precondition(lambda self: self.living)
    @rule(index=sessions, size=sizes, seed=seeds)
    def miss_a_deadline(self, index: int, size: int, seed: int) -> None:
        """A message whose deadline passes while the device is busy leaves no trace."""
        session_id, known = self.pick(index)
        inputs = random_inputs(size, seed)

        async def send() -> Any:
            with self.caller.hold(known.model):
                answer = await tried(self.send(session_id, inputs, known.next_step, timeout=0.02))
                while self.server.calls.num_calls:  # the server learns of it a moment later
                    await asyncio.sleep(0)
            return answer

        assert self.run(send()) == "DEADLINE_EXCEEDED"
        assert self.run(self._next_step_after_others(session_id)) == known.next_step

    @precondition(lambda self: self.living and len(self.living) < MOST_SESSIONS)
    @rule(index=sessions, by=st.integers(-1, 1), num_sends=st.integers(1, 3))
    def fork(self, index: int, by: int, num_sends: int) -> None:
        session_id, known = self.pick(index)
        fork_id = self.new_id()
        at_step = max(0, known.next_step + by)
        request = pb.ForkSessionRequest(
            source_session_id=session_id, at_step=at_step, session_id=fork_id, request_id=f"r-{fork_id}"
        )

        async def send() -> list[Any]:
            return await asyncio.gather(*(tried(self.stub.ForkSession(request)) for _ in range(num_sends)))

        answers = self.run(send())

        if at_step != known.next_step:
            assert set(answers) == {"STEP_GAP" if at_step > known.next_step else "STEP_TOO_OLD"}
            return
        for answer in answers:
            assert not isinstance(answer, str), answer
            assert (answer.session.session_id, answer.session.next_step) == (fork_id, at_step)
        self.living[fork_id] = known.copy()

    @precondition(lambda self: self.living and len(self.living) < MOST_SESSIONS)
    @rule(index=sessions)
    def export_and_import(self, index: int) -> None:
        session_id, known = self.pick(index)
        copy_id = self.new_id()
        exported = self.run(tried(self.stub.ExportSession(pb.ExportSessionRequest(session_id=session_id))))
        assert not isinstance(exported, str), exported
        request = pb.ImportSessionRequest(
            snapshot=exported.snapshot, session_id=copy_id, request_id=f"r-{copy_id}"
        )
        for _ in range(2):
            imported = self.run(tried(self.stub.ImportSession(request)))
            assert not isinstance(imported, str), imported
            assert imported.session.next_step == known.next_step
        self.living[copy_id] = known.copy()

    @precondition(lambda self: self.living)
    @rule(index=sessions, back=st.integers(-1, 4), num_sends=st.integers(1, 2))
    def reset(self, index: int, back: int, num_sends: int) -> None:
        session_id, known = self.pick(index)
        at_step = max(0, known.next_step - back)
        request = pb.ResetSessionRequest(session_id=session_id, at_step=at_step)
        expected = known.reset(at_step)
        for _ in range(num_sends):
            answer = self.run(tried(self.stub.ResetSession(request)))
            assert (answer if isinstance(answer, str) else "") == expected

    @precondition(lambda self: self.living)
    @rule(index=sessions, allow_missing=st.booleans())
    def delete(self, index: int, allow_missing: bool) -> None:
        session_id, known = self.pick(index)
        request = pb.DeleteSessionRequest(session_id=session_id, allow_missing=allow_missing)
        first, second = (self.run(tried(self.stub.DeleteSession(request))) for _ in range(2))
        assert not isinstance(first, str), first
        assert isinstance(second, str) != allow_missing, second
        del self.living[session_id]
        self.ended[session_id] = ("SESSION_NOT_FOUND", known)

    @precondition(lambda self: self.living)
    @rule(used=st.sets(sessions, max_size=4), seed=seeds)
    def expire(self, used: set[int], seed: int) -> None:
        """Time passes, and only the sessions that are used go on."""
        survivors = dict(self.pick(index) for index in used)
        self.run(self._all_are_ready())
        Clock.ahead_s += IDLE_LIMIT_S + 1
        for session_id, known in survivors.items():
            inputs = random_inputs(1, seed)
            assert same(self.run(tried(self.send(session_id, inputs, None))), known.step(inputs))
        self.run(self.server.sessions.expire_idle())
        for session_id in sorted(self.living.keys() - survivors.keys()):
            answer = self.run(tried(self.send(session_id, random_inputs(1, seed), None)))
            assert answer == "SESSION_EXPIRED"
            self.ended[session_id] = ("SESSION_EXPIRED", self.living.pop(session_id))

    @precondition(lambda self: self.ended)
    @rule(index=sessions, seed=seeds)
    def come_too_late(self, index: int, seed: int) -> None:
        session_id = sorted(self.ended)[(index + seed) % len(self.ended)]
        reason, known = self.ended[session_id]
        answer = self.run(tried(self.send(session_id, random_inputs(1, seed), known.next_step)))
        assert answer == reason

    @precondition(lambda self: self.living)
    @rule(index=sessions)
    def look(self, index: int) -> None:
        self.run(self._check(*self.pick(index)))

    @rule(size=st.integers(1, 4))
    def list_them(self, size: int) -> None:
        async def pages() -> dict[str, int]:
            found: dict[str, int] = {}
            token = ""
            while True:
                page = await self.stub.ListSessions(pb.ListSessionsRequest(page_size=size, page_token=token))
                found |= {session.session_id: session.next_step for session in page.sessions}
                token = page.next_page_token
                if not token:
                    return found

        expected = {session_id: known.next_step for session_id, known in sorted(self.living.items())}
        assert self.run(pages()) == expected

    @precondition(lambda self: self.keeps_steps)
    @rule(by_crash=st.booleans())
    def restart(self, by_crash: bool) -> None:
        self.run(self._stop(crash(self.server) if by_crash else self.server.stop()))
        self.run(self._start())

    @precondition(lambda self: self.keeps_steps and self.living)
    @rule(chosen=st.sets(sessions, min_size=1), size=sizes, seed=seeds, num_turns=st.integers(0, 200))
    def crash_under_load(self, chosen: set[int], size: int, seed: int, num_turns: int) -> None:
        """What was answered before is there after; what was not is there whole, or not at all."""
        ids = sorted({self.pick(index)[0] for index in chosen})
        inputs = {session_id: random_inputs(size, seed + n) for n, session_id in enumerate(ids)}

        async def send_and_crash() -> list[Any]:
            calls = [
                asyncio.ensure_future(
                    tried(self.send(session_id, inputs[session_id], self.living[session_id].next_step))
                )
                for session_id in ids
            ]
            for _ in range(num_turns):
                await asyncio.sleep(0)
            await crash(self.server)
            answers = await asyncio.gather(*calls)
            await self.caller.channel.close()
            return answers

        answers = self.run(send_and_crash())
        self.run(self._start())

        for session_id, answer in zip(ids, answers, strict=True):
            known = self.living[session_id]
            if isinstance(answer, str):
                self.run(self._settle(session_id, known, inputs[session_id]))
            else:
                assert same(answer, known.step(inputs[session_id]))

    # Looking.

    async def _settle(self, session_id: str, known: Known, inputs: np.ndarray) -> None:
        """Learn whether a message was run whose caller was not told; then send it again."""
        next_step = await self._next_step_after_others(session_id)
        assert next_step in (known.next_step, known.next_step + len(inputs))
        first_step = known.next_step
        if next_step != first_step:
            known.step(inputs)
        await self._check(session_id, known)
        expected = known.step(inputs, first_step)
        assert same(await tried(self.send(session_id, inputs, first_step)), expected)

    async def _next_step_after_others(self, session_id: str) -> int:
        """The counter when the calls that wait have been served."""
        answer = await tried(self.stub.GetState(pb.GetStateRequest(session_id=session_id)))
        assert not isinstance(answer, str), answer
        return int(answer.next_step)

    async def _check(self, session_id: str, known: Known) -> None:
        answer = await tried(self.stub.GetState(pb.GetStateRequest(session_id=session_id)))
        assert not isinstance(answer, str), (session_id, answer)
        assert not answer.approximate
        assert answer.next_step == known.next_step
        for tensor in answer.state:
            assert to_array(tensor.value).tobytes() == known.state[tensor.name].tobytes(), tensor.name

    async def _all_are_ready(self) -> None:
        """Wait for the state of every session: one whose state is on its way in is not idle, and does not expire."""
        while not all(session.is_ready for session in self.server.sessions.in_memory.values()):
            await asyncio.sleep(0)

    async def _check_everything(self) -> None:
        for session_id, known in self.living.items():
            assert await self.caller.next_step(session_id) == known.next_step
            await self._check(session_id, known)
        for session_id, (reason, _) in self.ended.items():
            request = pb.GetSessionRequest(session_id=session_id)
            assert await tried(self.stub.GetSession(request)) == reason


async def _each(requests: list[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        step_models.write(root, make(), name)
    return root


@pytest.fixture(params=["none", "sqlite", "redis"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes URLs of empty stores."""
    if request.param == "none":
        yield lambda: "none"
    elif request.param == "sqlite":
        yield lambda: f"sqlite:///{tempfile.mkdtemp(dir=tmp_path)}/sessions.sqlite3"
    else:
        server = ValkeyServer(tmp_path / "valkey", appendonly="no")
        server.start()

        def emptied() -> str:
            with server.client() as client:
                client.flushdb()
            return server.url

        yield emptied
        server.stop()


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "ahead_s", 0.0)
    for name in ("time_s", "service_time_s"):
        get = getattr(AsyncStore, name).fget
        monkeypatch.setattr(AsyncStore, name, property(lambda journal, get=get: get(journal) + Clock.ahead_s))


@pytest.mark.usefixtures("_clock")
@pytest.mark.timeout(1200)
def test_any_history_of_calls_gives_what_each_session_alone_would(
    new_store: Callable[[], str], small_models: Path
) -> None:
    is_long = settings.get_current_profile_name() == "chaos"
    run_state_machine_as_test(
        lambda: RetryWindows(new_store(), small_models),
        settings=settings(
            max_examples=60 if is_long else 6,
            deadline=None,
            stateful_step_count=40,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
