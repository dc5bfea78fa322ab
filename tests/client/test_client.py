"""The Python clients against a real server: arrays in and out, errors as types, and retries that take effect once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import ntm
from ntm import AsyncClient, Client
from tests.client.helpers import intercept
from tests.conftest import ServerProcess
from tests.server.helpers import accumulated, random_inputs

Start = Callable[..., ServerProcess]


def test_a_session_runs_arrays_however_long(address: str) -> None:
    inputs = random_inputs(75)

    with Client(address) as c, c.session("accumulator") as session:
        outputs = session.run(inputs)

        assert session.next_step == 75
    np.testing.assert_array_equal(outputs, accumulated(inputs))


def test_one_step_at_a_time_gives_the_same(address: str) -> None:
    inputs = random_inputs(5)

    with Client(address) as c, c.session("accumulator") as session:
        outputs = [session.step(row) for row in inputs]

    np.testing.assert_array_equal(outputs, accumulated(inputs))


def test_a_session_ends_with_its_block(address: str) -> None:
    with Client(address) as c:
        with c.session("accumulator") as session:
            assert session.session_id in [s.session_id for s in c.sessions()]
        assert session.session_id not in [s.session_id for s in c.sessions()]


def test_an_error_in_the_block_is_not_hidden_by_the_end_of_the_session(address: str) -> None:
    with Client(address) as c, pytest.raises(ZeroDivisionError), c.session("accumulator"):
        _ = 1 / 0


def test_a_session_can_be_taken_up_again_by_id(address: str) -> None:
    inputs = random_inputs(6)
    with Client(address) as first:
        session = first.session("accumulator", session_id="taken-up")
        first_outputs = session.run(inputs[:3])

    with Client(address) as second, second.attach("taken-up") as session:
        outputs = session.run(inputs[3:])

    np.testing.assert_array_equal(np.concatenate([first_outputs, outputs]), accumulated(inputs))


def test_a_trace_has_the_state_after_every_step(address: str) -> None:
    inputs = random_inputs(4)

    with Client(address) as c, c.session("accumulator") as session:
        trace = session.trace(inputs)
        state = session.state("sum")

    np.testing.assert_array_equal(trace.outputs, accumulated(inputs))
    np.testing.assert_array_equal(trace.state["sum"], accumulated(inputs))
    np.testing.assert_array_equal(state["sum"], accumulated(inputs)[-1])


def test_reset_and_fork(address: str) -> None:
    inputs = random_inputs(4)

    with Client(address) as c, c.session("accumulator") as session:
        session.run(inputs[:2])
        with session.fork() as fork:
            session.reset()
            np.testing.assert_array_equal(session.run(inputs), accumulated(inputs))
            np.testing.assert_array_equal(fork.run(inputs[2:]), accumulated(inputs)[2:])


def test_many_sessions_in_one_message(address: str) -> None:
    inputs = np.stack([random_inputs(4, seed) for seed in range(3)])

    with Client(address) as c:
        sessions = [c.session("accumulator") for _ in range(3)]
        sessions[1].delete()
        result = c.batch_step(sessions, inputs)

    np.testing.assert_array_equal(result.outputs[0], accumulated(inputs[0]))
    np.testing.assert_array_equal(result.outputs[2], accumulated(inputs[2]))
    assert isinstance(result.errors[1], ntm.NotFoundError)
    assert [session.next_step for session in sessions] == [4, 0, 4]


def test_models_and_what_they_are(address: str) -> None:
    with Client(address) as c:
        assert [model.name for model in c.models()] == ["accumulator", "delay_line", "many_layouts"]
        assert c.model("many_layouts").spec.states[0].input_name == "memory"


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (np.zeros(3), r"send \[T, 3\]"),
        (np.zeros((2, 4)), r"send \[T, 3\]"),
        (np.zeros((2, 3), complex), "send float32"),
        (np.array([["a", "b", "c"]]), "send float32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_they_are_sent(
    address: str, inputs: Any, complaint: str
) -> None:
    with (
        Client(address) as c,
        c.session("accumulator") as session,
        pytest.raises(ValueError, match=complaint),
    ):
        session.run(inputs)


def test_errors_have_types_reasons_and_the_servers_words(address: str) -> None:
    with Client(address) as c:
        with pytest.raises(ntm.NotFoundError, match=r"accumulator/1.*MODEL_NOT_FOUND"):
            c.session("nothing")
        with pytest.raises(ntm.NotFoundError) as gone:
            c.attach("nobody")
        with c.session("accumulator", session_id="taken") as session:
            with pytest.raises(ntm.AlreadyExistsError):
                c.session("accumulator", session_id="taken")
            with pytest.raises(ntm.InvalidInputError) as invalid:
                session.run(np.full((1, 3), np.nan))
            session.next_step = 4
            with pytest.raises(ntm.StepOrderError) as order:
                session.run(np.zeros((1, 3)))

    assert (gone.value.reason, gone.value.code) == ("SESSION_NOT_FOUND", grpc.StatusCode.NOT_FOUND)
    assert invalid.value.metadata == {"field": "inputs.raw"}
    assert order.value.next_step == 0


def test_a_server_that_cannot_be_reached_is_an_error_after_the_time_for_retries() -> None:
    with Client("127.0.0.1:9", retry_for_s=0.2) as c, pytest.raises(ntm.UnavailableError):
        c.models()


class LosesAnswers(grpc.UnaryUnaryClientInterceptor):
    """Lets every call through, and loses each answer the first time, as a broken connection does."""

    def __init__(self) -> None:
        self.answered: set[bytes] = set()

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        call = continuation(details, request)
        call.result()
        key = details.method.encode() + request.SerializeToString()
        if key not in self.answered:
            self.answered.add(key)
            raise Lost
        return call


class Lost(grpc.RpcError):
    """UNAVAILABLE, as the client sees it."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the answer was lost"

    def trailing_metadata(self) -> tuple[()]:
        return ()


def test_every_call_takes_effect_once_when_its_answer_is_lost(address: str) -> None:
    inputs = random_inputs(30)

    with Client(address) as c:
        intercept(c, LosesAnswers())
        with c.session("accumulator") as session:
            outputs = session.run(inputs)
            with session.fork() as fork:
                session.reset()
                after_reset = session.run(inputs)
                fork_state = fork.state("sum")

        assert session.session_id not in [s.session_id for s in c.sessions()]

    np.testing.assert_array_equal(outputs, accumulated(inputs))
    np.testing.assert_array_equal(after_reset, accumulated(inputs))
    np.testing.assert_array_equal(fork_state["sum"], accumulated(inputs)[-1])
    assert session.next_step == 60


class TimesOutOnce(grpc.UnaryUnaryClientInterceptor):
    """The second Step's answer does not come in time; everything else does."""

    def __init__(self) -> None:
        self.num_steps = 0

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        call = continuation(details, request)
        call.result()
        self.num_steps += details.method.endswith("/Step")
        if self.num_steps == 2 and details.method.endswith("/Step"):
            raise TooLate
        return call


class TooLate(Lost):
    """DEADLINE_EXCEEDED, as the client sees it."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_run_that_failed_in_the_middle_can_be_made_again_as_it_was(address: str) -> None:
    inputs = random_inputs(50)

    with Client(address) as c, c.session("accumulator") as session:
        intercept(c, TimesOutOnce())
        with pytest.raises(ntm.DeadlineError):
            session.run(inputs)
        assert session.next_step == 0
        outputs = session.run(inputs)

        assert session.next_step == 50
    np.testing.assert_array_equal(outputs, accumulated(inputs))


async def test_the_asyncio_client_also_can_repeat_a_run_and_retries_what_was_unavailable(
    address: str,
) -> None:
    inputs = random_inputs(50)

    async with AsyncClient(address) as c, await c.session("accumulator") as session:
        step, codes = c._sessions.Step, [TooLate, Lost]
        sent = 0

        async def losing(request: Any, **options: Any) -> Any:
            nonlocal sent
            sent += 1
            answer = await step(request, **options)
            if sent > 1 and codes:
                raise codes.pop(0)
            return answer

        c._sessions.Step = losing
        with pytest.raises(ntm.DeadlineError):
            await session.run(inputs)
        outputs = await session.run(inputs)

        assert (session.next_step, codes) == (50, [])
    np.testing.assert_array_equal(outputs, accumulated(inputs))


def test_a_batch_whose_answer_was_lost_takes_effect_once(address: str) -> None:
    inputs = np.stack([random_inputs(4, seed) for seed in range(2)])

    with Client(address) as c:
        sessions = [c.session("accumulator") for _ in range(2)]
        intercept(c, LosesAnswers())
        result = c.batch_step(sessions, inputs)

    for row, outputs in zip(inputs, result.outputs, strict=True):
        np.testing.assert_array_equal(outputs, accumulated(row))
    assert [session.next_step for session in sessions] == [4, 4]


def test_a_client_waits_for_a_server_that_comes_back(start_server: Start, models: Path) -> None:
    first = start_server(models)
    with Client(first.address) as c:
        c.models()
        first.signal(signal.SIGKILL)
        first.wait()
        with futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(c.models)
            start_server(models, listen=first.address)

            assert len(waiting.result(timeout=30)) == 5


async def test_the_asyncio_client_does_the_same(address: str) -> None:
    inputs = random_inputs(45)

    async with AsyncClient(address) as c:
        async with await c.session("accumulator") as session:
            outputs = await session.run(inputs)
            trace = await session.trace(inputs[:2], ["sum"])
            async with await session.fork() as fork:
                await session.reset()
                one = await session.step(inputs[0])
                state = await fork.state("sum")
            batch = await c.batch_step([session], inputs[None, 1:3])
            again = await c.attach(session.session_id)
            listed = [s.session_id async for s in c.sessions("accumulator")]
        with pytest.raises(ntm.NotFoundError):
            await c.attach(session.session_id)
        assert len(await c.models()) == 3

    np.testing.assert_array_equal(outputs, accumulated(inputs))
    np.testing.assert_array_equal(trace.outputs, accumulated(np.concatenate([inputs, inputs[:2]]))[-2:])
    np.testing.assert_array_equal(state["sum"], trace.state["sum"][-1])
    np.testing.assert_array_equal(one, inputs[0])
    np.testing.assert_array_equal(batch.outputs[0], accumulated(inputs[:3])[1:])
    assert again.next_step == 50
    assert session.session_id in listed


def test_one_client_serves_several_threads(address: str) -> None:
    all_inputs = [random_inputs(20, seed) for seed in range(8)]
    barrier = threading.Barrier(8)

    def run(inputs: np.ndarray) -> np.ndarray:
        barrier.wait()
        with c.session("accumulator") as session:
            return session.run(inputs)

    with Client(address) as c, futures.ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(run, all_inputs))

    for inputs, output in zip(all_inputs, outputs, strict=True):
        np.testing.assert_array_equal(output, accumulated(inputs))
