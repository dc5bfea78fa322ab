"""The load that services have: what begins is ended, what is late or refused is not borne, and the search is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from benchmarks import service_load
from benchmarks.load import Kind, LoadError
from benchmarks.measuring import Figure
from benchmarks.scripts import NUM_STEPS, inference_script, own_script
from benchmarks.sequence_load import Script, TrialReport, trial
from benchmarks.server_process import MODELS, serving
from ntm import Client
from server.rpc.inference import grpc_service_pb2 as inference_pb

FIRST_NUMBER = 2**28
KINDS: tuple[Kind, ...] = ("unary", "stream")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(MODELS) as (address, _):
        yield address


@contextmanager
def answering(answer: Callable[[Any, grpc.ServicerContext], bytes]) -> Iterator[str]:
    """A server whose every unary method answers so."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(futures.ThreadPoolExecutor(64), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def run(
    address: str, script: Script, steps_per_s: float = 300, first_number: int = FIRST_NUMBER
) -> TrialReport:
    return trial(address, script, steps_per_s=steps_per_s, duration_s=0.3, first_number=first_number, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script_of", [own_script, inference_script])
def test_every_sequence_that_begins_is_ended_and_what_counts_is_answered(
    address: str, kind: Kind, script_of: Callable[[Kind], Script]
) -> None:
    number = 4 * KINDS.index(kind) + 8 * (script_of is own_script)  # ids that have ended are not free
    report = run(address, script_of(kind), first_number=FIRST_NUMBER + 1000 * number)

    assert report.num_due > 0
    assert 0 < report.num_sequences <= report.num_sent
    assert report.p50_ms <= report.p99_ms < float("inf")
    with Client(address) as client:
        assert not [*client.sessions()]


def test_the_messages_of_both_protocols_are_those_of_50_steps() -> None:
    for kind in KINDS:
        own, by_inference = own_script(kind), inference_script(kind)
        assert [len(own.messages), len(by_inference.messages)] == [NUM_STEPS + 2, NUM_STEPS]
        requests = [
            inference_pb.ModelInferRequest.FromString(by_inference.id(FIRST_NUMBER + 5).join(message.pieces))
            for message in by_inference.messages
        ]
        assert {request.parameters["sequence_id"].int64_param for request in requests} == {FIRST_NUMBER + 5}
        assert [i for i, r in enumerate(requests) if r.parameters["sequence_start"].bool_param] == [0]
        assert [i for i, r in enumerate(requests) if r.parameters["sequence_end"].bool_param] == [
            NUM_STEPS - 1
        ]


def test_a_rate_at_which_messages_are_refused_or_late_is_not_borne() -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    never = threading.Event()

    def late(request: Any, context: grpc.ServicerContext) -> bytes:
        never.wait(0.15)
        return b""

    with answering(refuse) as address:
        refused = run(address, inference_script("unary"))
    with answering(late) as address:
        slow = run(address, inference_script("unary"), steps_per_s=100)

    assert not refused.is_held
    assert not slow.is_held


def test_a_message_that_fails_ends_the_trial_with_why() -> None:
    def fail(request: Any, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.NOT_FOUND, "no model")

    with answering(fail) as address, pytest.raises(LoadError, match="no model"):
        run(address, inference_script("unary"))


def test_an_error_in_a_streams_answer_ends_the_trial(address: str) -> None:
    script = inference_script("stream")
    without_start = Script(script.messages[1:], NUM_STEPS - 1, "varint", tells_errors_in_band=True)

    with pytest.raises(LoadError, match="sequence_start"):
        run(address, without_start)


def search(monkeypatch: pytest.MonkeyPatch, bears: Callable[[int, float], bool]) -> Figure:
    """What 12 turns find; `bears` is told how many came before, and the rate."""
    num_tried = 0

    def measured(
        function: object, address: str, script: Script, *, steps_per_s: float, **_: Any
    ) -> TrialReport:
        nonlocal num_tried
        share = 1.0 if bears(num_tried, steps_per_s) else 0.5
        num_tried += 1
        return TrialReport(1000, share, 1.0, 2.0, 1000, 20, 0.1)

    monkeypatch.setattr(service_load, "in_own_process", measured)
    server = service_load._Server("nowhere", [])
    found = service_load._Search(service_load._SequenceLoad(server, own_script("unary"), 1.0))
    for _ in range(12):
        if not found.is_over:
            found.go_on()
    return found.found("case")["steps_per_s"]


@pytest.mark.parametrize("highest", [600, 2500, 7300, 35000])
def test_the_search_comes_within_an_eighth_of_an_octave_of_the_highest_rate(
    monkeypatch: pytest.MonkeyPatch, highest: float
) -> None:
    found = search(monkeypatch, lambda _, rate: rate <= highest)

    assert found.lowest <= highest < found.highest
    assert found.highest / found.lowest < 1.1


@pytest.mark.parametrize("busy", [0, 1, 2, 3, 4])
def test_the_search_comes_back_from_a_rate_that_was_lost_by_chance(
    monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    found = search(monkeypatch, lambda num_tried, rate: num_tried != busy and rate <= 9000)

    assert found.lowest <= 9000 < 1.1 * found.lowest


def test_a_server_that_bears_no_rate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="too many"):
        search(monkeypatch, lambda _, rate: False)
