"""Tracing: a span for each call, with the queue, the run and the commit of its requests below it.

The OpenTelemetry SDK samples, batches and sends the spans (OTLP over HTTP), in a thread of its own; it is imported only
when a collector is named. Spans have the times that requests carry anyway, so nothing is measured for them. The trace
of a caller that sends a W3C `traceparent` goes on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from server.errors import TracingError
from server.rpc.failures import Metadata
from server.rpc.status import Status
from server.sessions.following import current_follower, followed_by

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from server.sessions.request import EngineCall, StepRequest, TimesS

log = structlog.get_logger()

_CARRIED = frozenset({"traceparent", "tracestate"})
_EXPORT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 1.0

_SERVERS_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""What makes a server's span an error, by OpenTelemetry's conventions for gRPC."""


def check_is_installed() -> None:
    """That spans could be made and sent here.

    Raises:
        TracingError: OpenTelemetry is not installed.
    """
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise TracingError from error


def open_tracing(endpoint: str, version: str) -> Tracing:
    """Send spans to a collector, from now on.

    Args:
        endpoint: its URL without the path of a signal, such as http://127.0.0.1:4318.
        version: the server's.

    Raises:
        TracingError: OpenTelemetry is not installed.
    """
    check_is_installed()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before these.
    own = Resource.create({"service.name": "ntm-server", "service.version": version})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


class Tracing:
    """Makes the spans of calls."""

    def __init__(self, provider: TracerProvider) -> None:
        """By a provider, which is closed with this."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("ntm.server")
        self._propagator = TraceContextTextMapPropagator()
        self._log_handler = _LogHandler()
        logger = logging.getLogger("opentelemetry")
        logger.addHandler(self._log_handler)
        logger.propagate = False

    def begin(self, method: str, metadata: Metadata) -> CallSpan | None:
        """The span of a call of /SERVICE/NAME that has just come in; None if it is not sampled."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        carried = {key: value for key, value in metadata if key in _CARRIED and isinstance(value, str)}
        name = method.lstrip("/")
        span = self._tracer.start_span(
            name,
            self._propagator.extract(carried, Context()),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": name},
        )
        return CallSpan(self._tracer, span) if span.is_recording() else None

    @contextmanager
    def call(self, method: str, metadata: Metadata) -> Iterator[None]:
        """Around a call of /SERVICE/NAME that is handled in this task."""
        span = self.begin(method, metadata)
        if span is None:
            yield
            return
        try:
            with followed_by(span):
                yield
        except asyncio.CancelledError:
            span.end(grpc.StatusCode.CANCELLED)
            raise
        except BaseException:
            span.end(grpc.StatusCode.UNKNOWN)
            raise
        span.end(grpc.StatusCode.OK)

    async def close(self) -> None:
        """Send what is left, if the collector takes it within a second."""

        def close() -> None:
            self._provider.shutdown()
            logger = logging.getLogger("opentelemetry")
            logger.removeHandler(self._log_handler)

        # A daemon: a collector that does not answer must not hold the process.
        closing = threading.Thread(target=close, name="last spans", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSE_TIMEOUT_S)


def current_span() -> CallSpan | None:
    """The span of the call that runs in this task, if it is traced."""
    follower = current_follower()
    return follower if isinstance(follower, CallSpan) else None


class CallSpan:
    """The span of one call."""

    __slots__ = ("_context", "_epoch_ns", "_span", "_told", "_tracer")

    def __init__(self, tracer: Any, span: Span) -> None:
        """It has begun."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, Context())
        self._epoch_ns = time_ns() - perf_counter_ns()
        """When this process's clock began: one for a call, so that its spans fit together."""
        self._told: Status | None = None

    @property
    def trace_id(self) -> str:
        """The trace's, as W3C writes it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def note(self, request: StepRequest | EngineCall, commit_times_s: TimesS | None = None) -> None:
        """Add what became of a request, with the times that it has."""
        if not request.start_time_s:  # answered from the retry window, or refused
            return
        self._add("queue", (request.submit_time_s, request.start_time_s))
        if request.end_time_s:
            about = {"ntm.num_sessions": request.num_rows, "ntm.num_steps": request.steps_done}
            self._add("run", (request.start_time_s, request.end_time_s), about)
        if commit_times_s is not None:
            self._add("commit", commit_times_s)

    def fail(self, told: Status) -> None:
        """The call fails, and its caller is told why."""
        self._told = told

    def end(self, code: grpc.StatusCode) -> None:
        """The call is over; with the code of why it has failed, if it has."""
        from opentelemetry.trace import StatusCode

        span, told = self._span, self._told
        if told is not None:
            code = told.code
            span.set_attributes({"ntm.reason": told.reason, "ntm.request_id": told.request_id})
        span.set_attribute("rpc.response.status_code", code.name)
        if code in _SERVERS_FAULTS:
            span.set_attribute("error.type", code.name)
            span.set_status(StatusCode.ERROR, None if told is None else told.message)
        span.end()

    def _add(self, name: str, times_s: TimesS, about: Mapping[str, AttributeValue] | None = None) -> None:
        start_ns, end_ns = (self._epoch_ns + int(time_s * 1e9) for time_s in times_s)
        self._tracer.start_span(name, self._context, attributes=about, start_time=start_ns).end(end_ns)


class _LogHandler(logging.Handler):
    """Says in the server's log what OpenTelemetry says in the standard library's."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            log.warning("spans are not sent as they should be", problem=record.getMessage())
