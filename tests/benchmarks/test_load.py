"""The load generator against real servers: what it counts was answered, and what fails is not counted but raised."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from hyperframe.frame import Frame, GoAwayFrame, RstStreamFrame, SettingsFrame

from benchmarks import calls, echo, http2
from benchmarks.load import Call, Kind, LoadError, closed_loop, in_own_process, open_loop
from ntm import Client
from ntm.tensor import to_array
from ntm.v1 import session_service_pb2 as pb
from tests import step_models
from tests.conftest import ServerProcess
from tests.server.helpers import accumulated

IDS = [f"session-{number}" for number in range(5)]
NOT_FOUND, UNIMPLEMENTED = 5, 12


@pytest.fixture(scope="module", params=["asyncio", "threads"])
def echo_address(request: pytest.FixtureRequest) -> Iterator[str]:
    with echo.running(request.param) as (address, _):
        yield address


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = tmp_path_factory.mktemp("models")
    step_models.write(models, step_models.accumulator(), "accumulator")
    server = ServerProcess(models, "--max-steps-per-message", "16384", "--retry-window-steps", "16384")
    yield server.address
    server.stop()


def new_sessions(address: str, count: int) -> list[str]:
    with Client(address) as client:
        return [client.session("accumulator").session_id for _ in range(count)]


def lanes_of(kind: Kind, ids: Sequence[str], num_steps: int = 1, input_size: int = 9) -> list[Call]:
    build = calls.step_calls if kind == "unary" else calls.stream_calls
    return build(ids, num_steps, input_size)


def step_answer(kind: Kind, answer: bytes) -> pb.StepResponse:
    return (
        pb.StepResponse.FromString(answer)
        if kind == "unary"
        else pb.StreamStepsResponse.FromString(answer).step
    )


@pytest.mark.parametrize("kind", ["unary", "stream"])
@pytest.mark.parametrize("in_flight", [1, 7])
@pytest.mark.parametrize("num_connections", [1, 2])
def test_every_message_of_every_lane_is_counted_once_and_the_warm_up_is_not(
    echo_address: str, kind: Kind, in_flight: int, num_connections: int
) -> None:
    report = closed_loop(
        echo_address,
        lanes_of(kind, IDS, num_steps=3),
        kind,
        in_flight=in_flight,
        num_messages=20,
        warmup_messages=4,
        num_connections=num_connections,
    )

    assert report.num_messages == 5 * 20
    assert report.num_steps == 5 * 20 * 3
    assert report.num_steps_sent == 5 * (20 + 4) * 3, "the server works for the warm-up as well"
    assert report.is_offered_load_kept
    assert [len(step_answer(kind, answer).outputs.raw) for answer in report.last_answers] == [3 * 8 * 4] * 5


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_messages_larger_than_a_frame_and_a_window_pass_whole_both_ways(
    echo_address: str, kind: Kind
) -> None:
    lanes = lanes_of(kind, IDS, num_steps=8192)
    assert len(lanes[0].payload(0)) > 4 * 65536

    report = closed_loop(echo_address, lanes, kind, in_flight=3, num_messages=6)

    assert report.num_messages == 5 * 6
    for answer in report.last_answers:
        np.testing.assert_array_equal(
            to_array(step_answer(kind, answer).outputs), np.full((8192, 8), 0.5, np.float32)
        )


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_the_server_gets_its_window_back(
    echo_address: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2, "WINDOW_BYTES", 100_000)

    report = closed_loop(echo_address, lanes_of(kind, IDS, num_steps=4096), kind, in_flight=2, num_messages=5)

    assert report.num_messages == 5 * 5


@pytest.mark.parametrize("kind", ["unary", "stream"])
@pytest.mark.parametrize("num_steps", [2, 6000])
def test_a_real_session_takes_a_lanes_messages_in_order_each_once(
    address: str, kind: Kind, num_steps: int
) -> None:
    lanes = lanes_of(kind, new_sessions(address, 3), num_steps, input_size=step_models.WIDTH)
    sent = lanes[0].payload(0)
    request = (
        pb.StepRequest.FromString(sent) if kind == "unary" else pb.StreamStepsRequest.FromString(sent).step
    )

    in_flight = 4 if kind == "stream" else 1  # gRPC keeps no order between calls
    report = closed_loop(address, lanes, kind, in_flight=in_flight, num_messages=6, warmup_messages=2)

    expected = accumulated(np.tile(to_array(request.inputs), (8, 1)))[-num_steps:]
    for answer in report.last_answers:
        response = step_answer(kind, answer)
        assert response.next_step == 8 * num_steps
        np.testing.assert_array_equal(to_array(response.outputs), expected)


def test_a_batch_counts_the_steps_of_all_its_sessions(address: str) -> None:
    call = calls.batch_call(new_sessions(address, 4), 3, step_models.WIDTH)

    report = closed_loop(address, [call], "unary", num_messages=5)

    calls.check_batches(report)
    assert (report.num_messages, report.num_steps) == (5, 5 * 4 * 3)
    assert list(pb.BatchStepResponse.FromString(report.last_answers[0]).next_steps) == [15] * 4


def test_a_session_that_fails_within_a_batch_is_found(address: str) -> None:
    call = calls.batch_call([*new_sessions(address, 1), "unknown"], 3, step_models.WIDTH)
    report = closed_loop(address, [call], "unary", num_messages=5)

    with pytest.raises(LoadError, match="session 1 of a batch failed, SESSION_NOT_FOUND") as caught:
        calls.check_batches(report)

    assert caught.value.status == NOT_FOUND


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_a_call_that_fails_ends_the_load_with_its_status(address: str, kind: Kind) -> None:
    lanes = lanes_of(kind, [*new_sessions(address, 1), "unknown"], input_size=step_models.WIDTH)

    with pytest.raises(LoadError, match="no session 'unknown'") as caught:
        closed_loop(address, lanes, kind, in_flight=2, duration_s=60)

    assert caught.value.status == NOT_FOUND


def test_a_method_that_is_not_there_ends_the_load_with_its_status(echo_address: str) -> None:
    with pytest.raises(LoadError) as caught:
        closed_loop(echo_address, [Call("/ntm.v1.SessionService/Nothing", b"")], "unary", num_messages=1)

    assert caught.value.status == UNIMPLEMENTED


def test_a_load_in_a_process_of_its_own_reports_and_fails_as_here(echo_address: str) -> None:
    missing = Call("/ntm.v1.SessionService/Nothing", b"")

    report = in_own_process(closed_loop, echo_address, lanes_of("unary", IDS), "unary", num_messages=10)
    with pytest.raises(LoadError) as caught:
        in_own_process(closed_loop, echo_address, [missing], "unary", num_messages=10)

    assert report.num_messages == 50
    assert caught.value.status == UNIMPLEMENTED


def test_a_server_that_dies_ends_the_load(models: Path, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(models)
    ids = new_sessions(server.address, 2)
    lanes = lanes_of("stream", ids, input_size=step_models.WIDTH)

    def kill_when_it_has_stepped() -> None:
        with Client(server.address) as client:
            while client.attach(ids[0]).next_step == 0:
                pass
        server.signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_when_it_has_stepped)
    killer.start()
    with pytest.raises(LoadError, match=r"closed the connection|broke"):
        closed_loop(server.address, lanes, "stream", duration_s=60)

    killer.join()


def test_a_stream_that_ends_early_ends_the_load_though_its_status_is_ok() -> None:
    def two_answers(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield next(requests)
        yield next(requests)

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handler = grpc.stream_stream_rpc_method_handler(two_answers)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    with pytest.raises(LoadError, match="ended early"):
        closed_loop(address, [Call("/s/m", b"", is_numbered=False)], "stream", num_messages=5)

    server.stop(None).wait()


def test_a_load_for_a_time_counts_from_when_every_lane_has_had_an_answer() -> None:
    first_answers, num_early, num_answered = threading.Semaphore(0), 50, 0

    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        nonlocal num_answered
        for number, request in enumerate(requests):
            if number == 0 and request == b"late":
                for _ in range(num_early):
                    first_answers.acquire()
            first_answers.release()
            num_answered += 1
            yield request

    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.stream_stream_rpc_method_handler(answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    lanes = [Call("/s/m", name, is_numbered=False) for name in (b"early", b"late")]
    report = closed_loop(address, lanes, "stream", duration_s=0.2)

    server.stop(None).wait()
    assert 0 < report.wall_s <= 0.2
    assert 0 < report.num_messages < num_answered - num_early
    assert report.num_steps_sent == num_answered


@contextmanager
def answering(frames: Sequence[Frame], then_closes: bool) -> Iterator[str]:
    """A server that answers whatever it is sent with these frames."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"".join(frame.serialize() for frame in frames))
                while not then_closes and connection.recv(65536):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([RstStreamFrame(1, error_code=7)], "reset a call, HTTP/2 error 7"),
        (
            [GoAwayFrame(0, error_code=11, additional_data=b"too many")],
            "goes away, HTTP/2 error 11: too many",
        ),
        ([], "closed the connection|broke"),
    ],
)
def test_a_broken_connection_ends_the_load(frames: list[Frame], problem: str) -> None:
    with (
        answering([SettingsFrame(0), *frames], then_closes=not frames) as address,
        pytest.raises(LoadError, match=problem),
    ):
        closed_loop(address, lanes_of("unary", IDS), "unary", num_messages=5)


@pytest.mark.parametrize("kind", ["unary", "stream"])
@pytest.mark.parametrize("poisson_seed", [None, 0])
def test_an_open_loop_keeps_an_easy_rate(echo_address: str, kind: Kind, poisson_seed: int | None) -> None:
    report = open_loop(
        echo_address,
        lanes_of(kind, IDS),
        kind,
        messages_per_s=50,
        duration_s=2,
        poisson_seed=poisson_seed,
        warmup_messages=2,
    )

    assert report.is_offered_load_kept
    assert report.offered_per_s == pytest.approx(50, rel=0.3 if poisson_seed is not None else 0.01)
    assert report.num_messages <= 2 * report.offered_per_s


def test_an_open_loop_says_when_the_rate_was_not_kept(echo_address: str) -> None:
    report = open_loop(
        echo_address, lanes_of("unary", IDS[:1]), "unary", messages_per_s=100_000, duration_s=1
    )

    assert not report.is_offered_load_kept
    assert report.num_messages < 100_000
