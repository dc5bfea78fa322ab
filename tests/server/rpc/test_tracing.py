"""Spans of calls, as a collector on this machine gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from pydantic import ValidationError
from structlog.testing import capture_logs

from ntm import AsyncClient, Client, InternalError
from ntm.tensor import to_message
from ntm.v1 import session_service_pb2 as pb
from server.errors import TracingError
from server.launch import Server
from server.rpc.tracing import CallSpan
from server.settings import ServerSettings
from tests.conftest import ROOT, ServerProcess
from tests.server.helpers import Caller, Start, pending, random_inputs

TRANSPORTS = ("native", "grpcio")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = TRACEPARENT[:-1] + "0"
STEP = "ntm.v1.SessionService/Step"


class Collector:
    """Takes spans by OTLP over HTTP, as a real one does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        taken = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    taken.resource |= {a.key: a.value.string_value for a in of_resource.resource.attributes}
                    for of_scope in of_resource.scope_spans:
                        taken.spans += of_scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def calls(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def below(self, parent: Span) -> dict[str, Span]:
        """The spans of a call's requests, by name; none twice."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        assert len({span.name for span in found}) == len(found)
        assert all(span.trace_id == parent.trace_id for span in found)
        return {span.name: span for span in found}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@asynccontextmanager
async def traced(
    serve: Start, models: Path, collector: Collector, **settings: Any
) -> AsyncIterator[tuple[Server, Caller]]:
    """A server whose spans have all reached the collector at the end of the block."""
    server, address = await serve(models, otlp_endpoint=collector.endpoint, **settings)
    caller = Caller(server, address)
    yield server, caller
    await caller.channel.close()
    assert server._tracing is not None
    assert await asyncio.to_thread(server._tracing._provider.force_flush)


def attributes(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def step(num_steps: int = 2, session_id: str = "s", **fields: Any) -> pb.StepRequest:
    return pb.StepRequest(session_id=session_id, inputs=to_message(random_inputs(num_steps)), **fields)


def check_times(call: Span, parts: Sequence[Span]) -> None:
    """Parts of a call lie in it, one after another, each with a beginning before its end."""
    assert call.start_time_unix_nano < call.end_time_unix_nano
    at = call.start_time_unix_nano - 1_000_000  # clocks differ by less than that within a call
    for part in parts:
        assert at <= part.start_time_unix_nano < part.end_time_unix_nano
        at = part.end_time_unix_nano
    assert at <= call.end_time_unix_nano + 1_000_000


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_step_is_a_span_with_its_queue_its_run_and_its_commit_below(
    serve: Start, models: Path, tmp_path: Path, collector: Collector, transport: str
) -> None:
    store = f"sqlite:///{tmp_path}/s.sqlite3"
    async with traced(serve, models, collector, transport=transport, store=store) as (_, caller):
        await caller.create("accumulator")
        await caller.stub.Step(step(5))

    (call,) = collector.calls(STEP)
    parts = collector.below(call)
    assert [*parts] == ["queue", "run", "commit"]
    check_times(call, [*parts.values()])
    assert call.kind == Span.SPAN_KIND_SERVER
    assert attributes(call) == {
        "rpc.system.name": "grpc",
        "rpc.method": STEP,
        "rpc.response.status_code": "OK",
    }
    assert attributes(parts["run"]) == {"ntm.num_sessions": 1, "ntm.num_steps": 5}
    assert collector.resource["service.name"] == "ntm-server"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_time_in_the_queue_is_no_time_of_the_run(
    serve: Start, models: Path, collector: Collector, transport: str
) -> None:
    async with traced(serve, models, collector, transport=transport) as (_, caller):
        await caller.create("accumulator")
        with caller.hold("accumulator"):
            waiting = asyncio.ensure_future(caller.stub.Step(step()))
            await pending(caller, "accumulator", 1)
            before_s = perf_counter()  # the loop's own clock is of whole milliseconds
            while perf_counter() < before_s + 0.02:
                await asyncio.sleep(0)
        await waiting

    (call,) = collector.calls(STEP)
    parts = collector.below(call)
    assert [*parts] == ["queue", "run"]  # nothing is committed where there is no store
    queue = parts["queue"]
    assert queue.end_time_unix_nano - queue.start_time_unix_nano >= 20e6


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rpc", ["Step", "StreamSteps", "GetSession"])
async def test_the_trace_of_the_caller_goes_on(
    serve: Start, models: Path, collector: Collector, transport: str, rpc: str
) -> None:
    metadata = [("traceparent", TRACEPARENT), ("tracestate", "vendor=1")]
    async with traced(serve, models, collector, transport=transport) as (_, caller):
        await caller.create("accumulator")
        if rpc == "Step":
            await caller.stub.Step(step(), metadata=metadata)
        elif rpc == "GetSession":
            await caller.stub.GetSession(pb.GetSessionRequest(session_id="s"), metadata=metadata)
        else:
            messages = [pb.StreamStepsRequest(step=step())]
            assert len([_ async for _ in caller.stub.StreamSteps(iter(messages), metadata=metadata)]) == 1

    (call,) = collector.calls(f"ntm.v1.SessionService/{rpc}")
    assert call.trace_id.hex() == TRACEPARENT.split("-")[1]
    assert call.parent_span_id.hex() == TRACEPARENT.split("-")[2]
    assert call.trace_state == "vendor=1"
    assert [*collector.below(call)] == ([] if rpc == "GetSession" else ["queue", "run"])


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", TRACEPARENT.replace("0af", "XYZ")])
async def test_a_traceparent_that_cannot_be_read_begins_a_trace(
    serve: Start, models: Path, collector: Collector, header: str
) -> None:
    async with traced(serve, models, collector) as (_, caller):
        await caller.create("accumulator")
        await caller.stub.Step(step(), metadata=[("traceparent", header)])

    (call,) = collector.calls(STEP)
    assert not call.parent_span_id


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_the_caller_does_not_sample_makes_no_spans(
    serve: Start, models: Path, collector: Collector, transport: str
) -> None:
    async with traced(serve, models, collector, transport=transport) as (_, caller):
        await caller.create("accumulator")
        await caller.stub.Step(step(), metadata=[("traceparent", NOT_SAMPLED)])

    assert not collector.calls(STEP)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_call_that_fails_is_a_failed_span_with_its_reason_and_its_id(
    serve: Start, models: Path, collector: Collector, transport: str
) -> None:
    fails = to_message(np.full((1, 3), 9, np.float32))
    async with traced(serve, models, collector, transport=transport) as (_, caller):
        await caller.create("fragile")
        with capture_logs() as lines, pytest.raises(grpc.aio.AioRpcError):
            await caller.stub.Step(
                pb.StepRequest(session_id="s", inputs=fails), metadata=[("x-request-id", "r-1")]
            )

    (call,) = collector.calls(STEP)
    told = attributes(call)
    assert call.status.code == call.status.STATUS_CODE_ERROR
    assert (told["rpc.response.status_code"], told["error.type"]) == ("INTERNAL", "INTERNAL")
    assert (told["ntm.reason"], told["ntm.request_id"]) == ("STEP_FAILED", "r-1")
    (line,) = [line for line in lines if line["event"] == "a call failed"]
    assert line["trace_id"] == call.trace_id.hex()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_call_that_is_refused_for_its_callers_fault_is_no_error_of_the_server(
    serve: Start, models: Path, collector: Collector, transport: str
) -> None:
    async with traced(serve, models, collector, transport=transport) as (_, caller):
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.stub.Step(step())

    (call,) = collector.calls(STEP)
    assert call.status.code == call.status.STATUS_CODE_UNSET
    assert attributes(call)["ntm.reason"] == "SESSION_NOT_FOUND"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_call_whose_caller_leaves_is_a_cancelled_span(
    serve: Start, models: Path, collector: Collector, transport: str
) -> None:
    async with traced(serve, models, collector, transport=transport) as (server, caller):
        await caller.create("accumulator")
        with caller.hold("accumulator"):
            leaving = caller.stub.Step(step())
            staying = asyncio.ensure_future(leaving)
            await pending(caller, "accumulator", 1)
            staying.cancel()
            await asyncio.wait([staying])
            while server.calls.num_calls:
                await asyncio.sleep(0)

    (call,) = collector.calls(STEP)
    assert attributes(call)["rpc.response.status_code"] == "CANCELLED"


async def test_a_batch_and_a_request_of_the_inference_protocol_are_traced_too(
    serve: Start, models: Path, collector: Collector
) -> None:
    from tests.server.test_metrics import infer

    async with traced(serve, models, collector) as (_, caller):
        for session_id in ("a", "b"):
            await caller.create("accumulator", session_id)
        inputs = to_message(np.ones((2, 3, 3), np.float32))
        await caller.stub.BatchStep(pb.BatchStepRequest(session_ids=["a", "b"], inputs=inputs))
        await infer(caller.address, 3, 4)

    (batch,) = collector.calls("ntm.v1.SessionService/BatchStep")
    assert attributes(collector.below(batch)["run"]) == {"ntm.num_sessions": 2, "ntm.num_steps": 3}
    (inference,) = collector.calls("inference.GRPCInferenceService/ModelInfer")
    assert attributes(collector.below(inference)["run"])["ntm.num_steps"] == 4


async def test_what_is_answered_from_the_retry_window_has_no_run(
    serve: Start, models: Path, collector: Collector
) -> None:
    async with traced(serve, models, collector) as (_, caller):
        await caller.create("accumulator")
        for _ in range(2):
            await caller.stub.Step(step(first_step=0))

    assert sorted(len(collector.below(call)) for call in collector.calls(STEP)) == [0, 2]


async def test_opentelemetrys_own_variables_say_how_many_calls_are_traced(
    serve: Start, models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    async with traced(serve, models, collector) as (_, caller):
        await caller.create("accumulator")
        await caller.stub.Step(step())
        await caller.stub.Step(step(), metadata=[("traceparent", TRACEPARENT)])

    assert [call.trace_id.hex() for call in collector.calls(STEP)] == [TRACEPARENT.split("-")[1]]


def test_the_endpoint_is_a_setting_like_others_and_goes_before_the_standard_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text('otlp_endpoint = "http://file:4318"\n')
    monkeypatch.setenv("NTM_SERVER_CONFIG", str(tmp_path / "config.toml"))
    found = [ServerSettings().otlp_endpoint]
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "NTM_SERVER_OTLP_ENDPOINT"):
        monkeypatch.setenv(name, f"http://{name.lower()}:4318")
        found.append(ServerSettings().otlp_endpoint)
    found.append(ServerSettings(otlp_endpoint="https://given").otlp_endpoint)

    assert found == [
        "http://file:4318",
        "http://otel_exporter_otlp_endpoint:4318",
        "http://ntm_server_otlp_endpoint:4318",
        "https://given",
    ]


def test_a_standard_variable_that_is_empty_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")

    assert ServerSettings().otlp_endpoint is None


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://h:4317", "http://", "http://h:4318/v1/traces"])
def test_an_endpoint_that_no_spans_could_go_to_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="the http or https URL of a collector"):
        ServerSettings(otlp_endpoint=url)


def test_without_an_endpoint_nothing_is_traced_and_opentelemetry_is_not_loaded() -> None:
    program = (
        "import sys, server.launch, server.__main__; from server.settings import ServerSettings; "
        "assert ServerSettings().otlp_endpoint is None; "
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_span_that_cannot_be_made_keeps_no_caller_waiting(
    serve: Start, models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(CallSpan, "note", lambda *_: 1 / 0)

    async with traced(serve, models, collector, transport=transport) as (_, caller):
        await caller.create("accumulator")
        assert len(await caller.step(random_inputs(2))) == 2


def test_a_check_of_the_settings_finds_that_opentelemetry_is_missing(models: Path) -> None:
    program = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None; "
        f"sys.argv[1:] = ['check-config', '--models', {str(models)!r}, '--otlp-endpoint', 'http://127.0.0.1:4318']; "
        "from server.__main__ import main; sys.exit(main())"
    )

    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert ended.returncode == 1
    assert "the server does not start: spans are to be sent to otlp_endpoint" in ended.stderr


async def test_a_collector_that_is_away_is_told_in_the_log_and_fails_no_call(
    serve: Start, models: Path
) -> None:
    gone = Collector()
    gone.close()

    with capture_logs() as lines:
        async with traced(serve, models, gone) as (_, caller):
            await caller.create("accumulator")
            await caller.stub.Step(step())

    assert "spans are not sent as they should be" in {line["event"] for line in lines}


async def test_spans_asked_for_without_opentelemetry_stop_the_start(
    serve: Start, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)

    with pytest.raises(TracingError, match="install the extra otel"):
        await serve(models, otlp_endpoint="http://127.0.0.1:4318")


def test_a_server_that_stops_sends_its_last_spans(
    start_server: Any, models: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint
    )  # as OpenTelemetry's own tools are told
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    server: ServerProcess = start_server(models)
    with Client(server.address) as client, client.session("accumulator") as session:
        session.run(random_inputs(2))

    server.stop()

    (call,) = collector.calls(STEP)
    assert [*collector.below(call)] == ["queue", "run"]
    assert collector.resource["service.name"] == "mine"


# The client.


@pytest.fixture
def application() -> Iterator[trace.Tracer]:
    """An application that is traced, and sends its spans nowhere."""
    provider = TracerProvider(shutdown_on_exit=False)
    yield provider.get_tracer("application")
    provider.shutdown()


async def test_the_client_hands_the_trace_of_its_application_on(
    serve: Start, models: Path, collector: Collector, application: trace.Tracer
) -> None:
    async with traced(serve, models, collector) as (_, caller), AsyncClient(caller.address) as client:
        session = await client.session("accumulator")
        with application.start_as_current_span("work") as work:
            await session.run(random_inputs(1))
            async for _ in session.stream([random_inputs(1)]):
                pass
            await client.batch_step([session], random_inputs(1)[None])
        await session.run(random_inputs(1))

    about = work.get_span_context()
    traces = {name: [span.trace_id.hex() for span in collector.calls(f"ntm.v1.SessionService/{name}")]
              for name in ("Step", "StreamSteps", "BatchStep")}  # fmt: skip
    own = f"{about.trace_id:032x}"
    assert [trace_id == own for trace_id in traces["Step"]] == [True, False]
    assert traces["StreamSteps"] == traces["BatchStep"] == [own]
    assert collector.calls(STEP)[0].parent_span_id.hex() == f"{about.span_id:016x}"


def test_the_synchronous_client_does_too(
    start_server: Any, models: Path, collector: Collector, application: trace.Tracer
) -> None:
    server: ServerProcess = start_server(models, "--otlp-endpoint", collector.endpoint)
    with (
        Client(server.address) as client,
        client.session("fragile") as session,
        application.start_as_current_span("work") as work,
        pytest.raises(InternalError),
    ):
        session.run(np.full((1, 3), 9, np.float32))

    server.stop()

    (call,) = collector.calls(STEP)
    assert call.trace_id.hex() == f"{work.get_span_context().trace_id:032x}"


def test_the_client_works_where_opentelemetry_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None; import ntm; from ntm import _requests; "
        "print(_requests.metadata('s'))"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert ended.stdout.strip() == "(('ntm-routing-key', 's'), ('ntm-retry-safe', '1'))"
