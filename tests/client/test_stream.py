"""Streams of chunks: outputs in order and once each, whatever breaks on the way, and sessions usable afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest

import ntm
from ntm import AsyncClient, Client
from ntm._errors import from_status
from ntm._flow import Flow
from tests.client.helpers import BreakingLine, Router, call_on
from tests.server.helpers import accumulated, random_inputs

BROKEN = [grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN]


def cut(inputs: np.ndarray, seed: int = 0, longest: int = 45) -> list[np.ndarray]:
    """Inputs in pieces of random lengths, some of none, some longer than a message may be."""
    ends = np.cumsum(np.random.default_rng(seed).integers(0, longest, len(inputs)))
    return np.split(inputs, ends[ends < len(inputs)])


async def each(chunks: list[np.ndarray]) -> AsyncIterator[np.ndarray]:
    for chunk in chunks:
        yield chunk


def test_a_stream_gives_each_chunks_outputs_in_order(address: str) -> None:
    inputs = random_inputs(400)
    chunks = cut(inputs)

    with Client(address) as c, c.session("accumulator") as session:
        outputs = list(session.stream(chunks))

        assert session.next_step == 400
        assert c.attach(session.session_id).next_step == 400
    assert [len(output) for output in outputs] == [len(chunk) for chunk in chunks]
    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


def test_next_step_moves_with_each_output(address: str) -> None:
    chunks = np.split(random_inputs(30), 6)

    with Client(address) as c, c.session("accumulator") as session:
        next_steps = [session.next_step for _ in session.stream(chunks)]

    assert next_steps == [5, 10, 15, 20, 25, 30]


def test_a_stream_without_chunks_gives_nothing(address: str) -> None:
    with Client(address) as c, c.session("accumulator") as session:
        assert list(session.stream([])) == []
        assert [output.shape for output in session.stream([np.zeros((0, 3))])] == [(0, 3)]
        assert session.next_step == 0


def test_chunks_are_taken_as_far_ahead_as_messages_may_be_under_way(address: str) -> None:
    taken = []

    def chunks() -> Iterator[np.ndarray]:
        for number in range(8):
            taken.append(number)
            yield random_inputs(1)

    def taken_at_each_output(max_in_flight: int) -> list[int]:
        taken.clear()
        return [len(taken) for _ in session.stream(chunks(), max_in_flight=max_in_flight)]

    with Client(address) as c, c.session("accumulator") as session:
        assert taken_at_each_output(1) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert taken_at_each_output(3) == [3, 4, 5, 6, 7, 8, 8, 8]


def test_a_chunk_may_depend_on_the_outputs_before_it_when_nothing_is_sent_ahead(address: str) -> None:
    outputs = [np.ones((1, 3), np.float32)]

    def chunks() -> Iterator[np.ndarray]:
        for _ in range(5):
            yield outputs[-1]

    with Client(address) as c, c.session("accumulator") as session:
        for output in session.stream(chunks(), max_in_flight=1):
            outputs.append(output)

    expected = np.float32(1)
    for _ in range(4):
        expected = np.float32(0.5) * expected + expected
    np.testing.assert_array_equal(outputs[-1], np.full((1, 3), expected))


def test_no_more_steps_are_unanswered_than_the_server_keeps_answers_for(address: str) -> None:
    with Client(address) as c, c.session("accumulator") as session:
        flow = Flow(session, max_in_flight=10)
        flow.add(random_inputs(75))  # four messages, of 20, 20, 20 and 15 steps; the window is 50

        assert [request.step.first_step for request in flow.due()] == [0, 20]


@pytest.mark.parametrize("max_in_flight", [0, -1])
def test_a_stream_has_a_message_under_way(address: str, max_in_flight: int) -> None:
    with (
        Client(address) as c,
        c.session("accumulator") as session,
        pytest.raises(ValueError, match="at least 1 message"),
    ):
        session.stream([], max_in_flight=max_in_flight)


def test_a_chunk_of_another_shape_ends_the_stream_and_harms_nothing(address: str) -> None:
    inputs = random_inputs(4)

    with Client(address) as c, c.session("accumulator") as session:
        stream = session.stream([inputs[:2], inputs[2:], np.zeros((2, 4))], max_in_flight=2)
        first = next(stream)
        with pytest.raises(ValueError, match=r"send \[T, 3\]"):
            next(stream)
        rest = session.run(inputs[2:])

    np.testing.assert_array_equal(np.concatenate([first, rest]), accumulated(inputs))


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_whose_connection_breaks_anywhere_equals_an_unbroken_run(address: str, seed: int) -> None:
    inputs = random_inputs(1500, seed)
    line = BreakingLine(address, seed, num_cuts=8)

    with contextlib.closing(line), Client(line.address) as c:
        session = c.session("accumulator")
        outputs = list(session.stream(cut(inputs, seed), max_in_flight=1 + seed))

        assert session.next_step == 1500
    with Client(address) as c, c.attach(session.session_id) as session:
        assert session.next_step == 1500
        np.testing.assert_array_equal(session.state("sum")["sum"], accumulated(inputs)[-1])
    assert line.num_cuts > 3
    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


@pytest.mark.parametrize("seed", range(3))
async def test_an_asyncio_stream_whose_connection_breaks_anywhere_does_too(address: str, seed: int) -> None:
    inputs = random_inputs(1500, seed)
    line = BreakingLine(address, seed, num_cuts=8)

    with contextlib.closing(line):
        async with AsyncClient(line.address) as c:
            session = await c.session("accumulator")
            outputs = [output async for output in session.stream(each(cut(inputs, seed)))]

            assert session.next_step == 1500
            await session.delete()
    assert line.num_cuts > 3
    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


@pytest.mark.parametrize("code", [*BROKEN, grpc.StatusCode.UNAVAILABLE])
def test_a_stream_that_a_router_ended_goes_on(router: Router, code: grpc.StatusCode) -> None:
    inputs = random_inputs(60)
    router.faults["StreamSteps"].extend([code, code])

    with Client(router.address) as c, c.session("accumulator") as session:
        outputs = list(session.stream(np.split(inputs, 12)))

        assert ("StreamSteps", session.session_id) in router.calls
    assert router.count("StreamSteps") == 3
    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


@pytest.mark.parametrize("code", BROKEN)
async def test_an_asyncio_stream_that_a_router_ended_goes_on(router: Router, code: grpc.StatusCode) -> None:
    inputs = random_inputs(60)
    router.faults["StreamSteps"].extend([code, code])

    async with AsyncClient(router.address) as c, await c.session("accumulator") as session:
        outputs = [output async for output in session.stream(np.split(inputs, 12))]

    assert router.count("StreamSteps") == 3
    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


def test_chunks_may_all_be_given_in_one_array_that_is_filled_again(router: Router) -> None:
    inputs = random_inputs(30)
    router.faults["StreamSteps"].extend([grpc.StatusCode.INTERNAL] * 3)
    chunk = np.empty((3, 3), np.float32)

    def chunks() -> Iterator[np.ndarray]:
        for rows in np.split(inputs, 10):
            chunk[:] = rows
            yield chunk

    with Client(router.address) as c, c.session("accumulator") as session:
        stream = session.stream(chunks())
        outputs = [next(stream) for _ in range(4)]
        stream.close()
        chunk[:] = 0
        outputs += session.stream([inputs[12:]])

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


def test_one_stream_may_feed_another(address: str) -> None:
    inputs = random_inputs(40)

    with Client(address) as c, c.session("accumulator") as first, c.session("accumulator") as second:
        outputs = list(second.stream(first.stream(np.split(inputs, 8))))

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(accumulated(inputs)))


def test_an_error_of_the_chunks_is_not_one_of_the_stream(address: str) -> None:
    inputs = random_inputs(3)

    with Client(address) as c, c.session("accumulator") as first, c.session("accumulator") as second:
        stream = second.stream(first.stream([inputs[:1], inputs[1:2], np.full((1, 3), np.nan)]))
        with pytest.raises(ntm.InvalidInputError):
            list(stream)

        assert (first.num_steps_ahead, second.num_steps_ahead) == (0, 2)


def test_the_time_for_retries_counts_from_the_last_progress(router: Router) -> None:
    router.answers_before_fault = 1
    router.faults["StreamSteps"].extend([grpc.StatusCode.UNAVAILABLE] * 11)
    inputs = random_inputs(12)

    # Each pause is up to 50 ms, so that all together take longer than one may.
    with Client(router.address, retry_for_s=0.1) as c, c.session("accumulator") as session:
        outputs = list(session.stream(np.split(inputs, 12)))

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))


def test_a_stream_that_cannot_go_on_fails_and_can_be_taken_up_again(router: Router) -> None:
    inputs = random_inputs(20)

    with Client(router.address, retry_for_s=0.2) as c, c.session("accumulator") as session:
        stream = session.stream(np.split(inputs, 10))
        first = next(stream)
        router.answers_before_fault = 0
        router.faults["StreamSteps"].extend([grpc.StatusCode.INTERNAL] * 1000)
        session._open_stream._hang_up()  # type: ignore[union-attr]
        with pytest.raises(ntm.UnavailableError) as caught:
            next(stream)
        assert (session.next_step, caught.value.code) == (2, grpc.StatusCode.INTERNAL)
        router.faults.clear()
        rest = list(session.stream(np.split(inputs[2:], 3)))

    np.testing.assert_array_equal(np.concatenate([first, *rest]), accumulated(inputs))


def test_a_message_that_the_server_refuses_ends_the_stream_after_the_answers_before_it(address: str) -> None:
    inputs = random_inputs(6)
    chunks = [inputs[:2], inputs[2:4], np.full((1, 3), np.nan), inputs[4:]]

    with Client(address) as c, c.session("accumulator") as session:
        outputs = []
        with pytest.raises(ntm.InvalidInputError):
            outputs += session.stream(chunks)  # what came before the error is kept

        assert (session.next_step, session.num_steps_ahead) == (4, 0)
        rest = session.run(inputs[4:])
    np.testing.assert_array_equal(np.concatenate([*outputs, rest]), accumulated(inputs))


def test_what_was_sent_before_the_stream_broke_may_have_run_though_its_repeat_is_refused(
    address: str,
) -> None:
    refusal = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "QUEUE_FULL", "", {})

    with Client(address) as c, c.session("accumulator") as session:
        flow = Flow(session, max_in_flight=3)
        for _ in range(2):
            flow.add(random_inputs(5))
            flow.due()
        assert len(flow.unanswered()) == 2
        assert len(flow.unanswered()) == 2  # again, on the next connection
        flow.add(random_inputs(5))
        flow.due()
        flow.failed(refusal)

        assert [len(message) for message in flow.ahead().messages] == [5, 5]


class TestLeftEarly:
    """A stream of five chunks of four steps, left after the first: three are sent ahead, and their fate unknown."""

    INPUTS = random_inputs(20)
    OTHERS = random_inputs(6, seed=1)

    def leave(self, session: Any) -> None:
        stream = session.stream(np.split(self.INPUTS, 5))
        np.testing.assert_array_equal(next(stream), accumulated(self.INPUTS)[:4])
        stream.close()
        assert (session.next_step, session.num_steps_ahead) == (4, 12)

    def test_the_same_inputs_give_their_outputs_in_whatever_pieces(self, address: str) -> None:
        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            few = session.run(self.INPUTS[4:7])
            rest = session.stream(np.split(self.INPUTS[7:], [1, 8]))

            np.testing.assert_array_equal(np.concatenate([few, *rest]), accumulated(self.INPUTS)[4:])
            assert (session.next_step, session.num_steps_ahead) == (20, 0)

    def test_what_a_second_stream_did_not_come_to_is_still_ahead(self, address: str) -> None:
        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            stream = session.stream(np.split(self.INPUTS[4:], 4), max_in_flight=1)
            next(stream)
            stream.close()
            assert (session.next_step, session.num_steps_ahead) == (8, 8)
            outputs = session.run(self.OTHERS)

        everything = np.concatenate([self.INPUTS[:16], self.OTHERS])
        np.testing.assert_array_equal(outputs, accumulated(everything)[16:])

    @pytest.mark.parametrize("how", ["run", "stream", "batch"])
    def test_other_inputs_come_after_what_was_sent(self, address: str, how: str) -> None:
        ways: dict[str, Callable[[Client, Any], np.ndarray]] = {
            "run": lambda _, session: session.run(self.OTHERS),
            "stream": lambda _, session: np.concatenate([*session.stream(np.split(self.OTHERS, 2))]),
            "batch": lambda c, session: c.batch_step([session], self.OTHERS[None]).outputs[0],
        }

        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            outputs = ways[how](c, session)

            assert (session.next_step, session.num_steps_ahead) == (22, 0)
        everything = np.concatenate([self.INPUTS[:16], self.OTHERS])
        np.testing.assert_array_equal(outputs, accumulated(everything)[16:])

    def test_inputs_that_begin_alike_and_then_differ_come_after_what_was_sent(self, address: str) -> None:
        chunks = [self.INPUTS[4:6], self.OTHERS]

        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            outputs = list(session.stream(chunks))

            assert session.next_step == 22
        everything = np.concatenate([self.INPUTS[:16], self.OTHERS])
        np.testing.assert_array_equal(outputs[0], accumulated(self.INPUTS)[4:6])
        np.testing.assert_array_equal(outputs[1], accumulated(everything)[16:])

    def test_its_state_and_its_copies_are_those_after_what_was_sent(self, address: str) -> None:
        expected = accumulated(self.INPUTS)[15]

        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            np.testing.assert_array_equal(session.state()["sum"], expected)
        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            with session.fork() as fork:
                assert fork.next_step == 16
                np.testing.assert_array_equal(fork.state()["sum"], expected)

    def test_it_can_be_reset(self, address: str) -> None:
        with Client(address) as c, c.session("accumulator") as session:
            self.leave(session)
            session.reset()

            np.testing.assert_array_equal(session.run(self.OTHERS), accumulated(self.OTHERS))

    def test_a_message_sent_ahead_that_is_refused_is_as_if_it_had_not_been_sent(self, address: str) -> None:
        chunks = [self.INPUTS[:2], self.INPUTS[2:4], np.full((1, 3), np.nan), self.INPUTS[4:]]

        with Client(address) as c, c.session("accumulator") as session:
            stream = session.stream(chunks)
            next(stream)
            stream.close()
            outputs = session.run(self.OTHERS)

            assert session.next_step == 10
        everything = np.concatenate([self.INPUTS[:4], self.OTHERS])
        np.testing.assert_array_equal(outputs, accumulated(everything)[4:])

    def test_nothing_is_ahead_of_a_stream_that_sends_nothing_ahead(self, address: str) -> None:
        with Client(address) as c, c.session("accumulator") as session:
            for _ in session.stream(np.split(self.INPUTS, 5), max_in_flight=1):
                break

            assert (session.next_step, session.num_steps_ahead) == (4, 0)
            session.run(self.OTHERS)
            assert session.next_step == 10

    def test_a_call_in_its_midst_ends_it(self, address: str) -> None:
        with Client(address) as c, c.session("accumulator") as session:
            stream = session.stream(np.split(self.INPUTS, 5))
            next(stream)
            outputs = session.run(self.INPUTS[4:])
            with pytest.raises(RuntimeError, match="another call of its session ended this stream"):
                next(stream)

            assert session.next_step == 20
        np.testing.assert_array_equal(outputs, accumulated(self.INPUTS)[4:])

    async def test_all_this_holds_for_asyncio_where_a_break_leaves_the_generator_open(
        self, address: str
    ) -> None:
        async with AsyncClient(address) as c, await c.session("accumulator") as session:
            async for _ in session.stream(each(np.split(self.INPUTS, 5))):
                break
            again = await session.run(self.INPUTS[4:8])
            assert (session.next_step, session.num_steps_ahead) == (8, 8)
            others = await session.run(self.OTHERS)

            assert session.next_step == 22
        everything = np.concatenate([self.INPUTS[:16], self.OTHERS])
        np.testing.assert_array_equal(again, accumulated(self.INPUTS)[4:8])
        np.testing.assert_array_equal(others, accumulated(everything)[16:])


class Silent(grpc.GenericRpcHandler):
    """Answers no stream."""

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            yield from ()
            for _ in requests:
                pass

        return grpc.stream_stream_rpc_method_handler(stream)


@pytest.fixture
def silent_address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Silent(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_an_answer_that_does_not_come_in_time_is_an_error(address: str, silent_address: str) -> None:
    with (
        Client(address, timeout_s=0.3) as c,
        c.session("accumulator") as session,
        grpc.insecure_channel(silent_address) as channel,
    ):
        own = c._connection.newest.channel
        call_on(c, channel)
        with pytest.raises(ntm.DeadlineError):
            next(session.stream([random_inputs(2)]))
        call_on(c, own)


def test_a_consumer_slower_than_the_time_for_an_answer_is_no_error(address: str) -> None:
    inputs = random_inputs(9)
    outputs = []

    with Client(address, timeout_s=0.2) as c, c.session("accumulator") as session:
        for output in session.stream(np.split(inputs, 9)):
            outputs.append(output)
            if len(outputs) in (1, 5):
                time.sleep(0.3)  # the consumer's own work

    np.testing.assert_array_equal(np.concatenate(outputs), accumulated(inputs))
