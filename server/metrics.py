"""Metrics: what Prometheus can scrape. Names and meanings stand in docs/serving.md."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import ClassVar, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector

from server.engine.engine import BatchReport, engine_thread_name
from server.runtime.provider import Device
from server.sessions.served_model import ServedModel
from server.storage.observer import Cause, Operation

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
MOST_PRINCIPALS = 100
"""Principals with labels of their own: those that call first."""
OTHER_PRINCIPALS = "other"
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Reason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]
"""Why a request failed, in Triton's words."""


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, *, triton: bool = False) -> None:
        """Nothing is counted yet.

        Args:
            triton: whether Triton's names are told too.
        """
        self.registry = CollectorRegistry()
        """All of them, to be told."""
        r = self.registry
        self._calls = Counter(
            "ntm_calls", "Calls answered, by rpc and status code.", ["rpc", "code"], registry=r
        )
        self._call_seconds = Histogram(
            "ntm_call_seconds", "From a call's arrival to its answer.", ["rpc"], buckets=_SECONDS, registry=r
        )
        self._refusals = Counter(
            "ntm_refusals",
            "Calls, and sessions of a batch, that were refused or failed, by the reason of their ErrorInfo.",
            ["reason"],
            registry=r,
        )
        self._children: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._steps = Counter("ntm_steps", "Steps run.", ["model"], registry=r)
        self._batch_size = Histogram(
            "ntm_batch_size", "Sessions run together in one step.", ["model"], buckets=_SIZES, registry=r
        )
        self._run_seconds = Histogram(
            "ntm_run_seconds", "Running one batch on the device.", ["model"], buckets=_SECONDS, registry=r
        )
        self._queue_seconds = Histogram(
            "ntm_queue_seconds",
            "A request's wait for its first turn.",
            ["model"],
            buckets=_SECONDS,
            registry=r,
        )
        self._principal_calls = Counter(
            "ntm_principal_calls",
            "Calls by principal, where callers are told apart.",
            ["principal"],
            registry=r,
        )
        self._principal_steps = Counter(
            "ntm_principal_steps",
            "Steps let in by principal, where callers are told apart.",
            ["principal"],
            registry=r,
        )
        self._principals: set[str] = set()
        self._take_overs = Counter(
            "ntm_session_take_overs",
            "Sessions that came from another replica: it gave them (asked), or its lease had run out (dead).",
            ["cause"],
            registry=r,
        )
        for cause in get_args(Cause):
            self._take_overs.labels(cause)
        self._store_read_seconds = Histogram(
            "ntm_store_read_seconds",
            "One operation of the store other than a commit.",
            ["operation"],
            buckets=_SECONDS,
            registry=r,
        )
        self._commit_writes = Histogram(
            "ntm_store_commit_writes",
            "Changes of sessions committed to the store together.",
            buckets=_SIZES,
            registry=r,
        )
        self._commit_seconds = Histogram(
            "ntm_store_commit_seconds", "One commit to the store.", buckets=_SECONDS, registry=r
        )
        self._sessions = Gauge("ntm_sessions", "Sessions in memory.", ["model"], registry=r)
        self._pending = Gauge("ntm_pending_messages", "Messages waiting or running.", ["model"], registry=r)
        self._threads = Gauge(
            "ntm_thread_alive", "1: a thread that must not end is alive.", ["thread"], registry=r
        )
        self._file_problems = Gauge(
            "ntm_model_file_problem",
            "1: a file in the models directory cannot be served, or has changed under its sessions.",
            ["model", "problem"],
            registry=r,
        )
        self._fell_back = Gauge(
            "ntm_device_fell_back", "1: device auto found no CUDA and fell back to the CPU.", registry=r
        )
        self._transport = Gauge(
            "ntm_transport", "1 for what carries gRPC: native or grpcio.", ["transport"], registry=r
        )
        self._triton = _TritonCollector() if triton else None
        if self._triton is not None:
            r.register(self._triton)

    def observe_commit(self, num_writes: int, seconds: float) -> None:
        """Count one commit to the store, of so many sessions' changes."""
        self._commit_writes.observe(num_writes)
        self._commit_seconds.observe(seconds)

    def observe_store_read(self, operation: Operation, seconds: float) -> None:
        """Count one operation of the store other than a commit."""
        self._store_read_seconds.labels(operation).observe(seconds)

    def count_take_over(self, cause: Cause) -> None:
        """Count a session that came from another replica."""
        self._take_overs.labels(cause).inc()

    def count_principal_call(self, principal: str) -> None:
        """Count a call of a principal who is known."""
        self._principal_calls.labels(self._principal_label(principal)).inc()

    def count_principal_steps(self, principal: str, num_steps: int) -> None:
        """Count steps of a principal that were let in."""
        self._principal_steps.labels(self._principal_label(principal)).inc(num_steps)

    def _principal_label(self, principal: str) -> str:
        """The name itself of the first MOST_PRINCIPALS; there must be no more labels than can be kept."""
        if principal not in self._principals:
            if len(self._principals) >= MOST_PRINCIPALS:
                return OTHER_PRINCIPALS
            self._principals.add(principal)
        return principal

    def count_call(self, rpc: str, code: str, seconds: float | None, num_calls: int = 1) -> None:
        """Count calls that were answered; None for the time of those that were refused unread."""
        children = self._children.get((rpc, code))
        if children is None:
            children = self._children[rpc, code] = (
                self._calls.labels(rpc, code),
                self._call_seconds.labels(rpc),
            )
        children[0].inc(num_calls)
        if seconds is not None:
            children[1].observe(seconds)

    def expect_refusals(self, reasons: Iterable[str]) -> None:
        """Tell of reasons for which nothing was refused yet, so that the first of each is seen as an increase."""
        for reason in reasons:
            self._refusals.labels(reason)

    def count_refusal(self, reason: str, num_calls: int = 1) -> None:
        """Count what was refused or failed, by one of the reasons that the errors have."""
        self._refusals.labels(reason).inc(num_calls)

    def batch_observer(self, model: str) -> Callable[[BatchReport], None]:
        """What to call after each batch of a model."""
        steps, sizes = self._steps.labels(model), self._batch_size.labels(model)
        run_seconds, queue_seconds = self._run_seconds.labels(model), self._queue_seconds.labels(model)

        triton = self._triton

        def observe(report: BatchReport) -> None:
            if triton is not None:
                triton.count_batch(model, report)
            steps.inc(report.num_rows * len(report.turn_times_s))
            for turn_s in report.turn_times_s:
                sizes.observe(report.num_rows)
                run_seconds.observe(turn_s)
            for wait_s in report.queue_times_s:
                queue_seconds.observe(wait_s)

        return observe

    def count_inference(self, model: str, seconds: float, failure: Reason | None) -> None:
        """Count a request of the inference protocol, by the model's label, and why it failed if it did."""
        if self._triton is not None:
            self._triton.count_request(model, seconds, failure)

    def watch(self, served: ServedModel) -> None:
        """Report a model's sessions and queue as they are when scraped."""
        label = served.model.label
        self._sessions.labels(label).set_function(lambda: served.num_sessions)
        self._pending.labels(label).set_function(lambda: served.num_pending)
        self.watch_thread(served.engine.thread)

    def watch_thread(self, thread: Thread) -> None:
        """Report whether a thread is alive, which must not end while its part of the server is there."""
        self._threads.labels(thread.name).set_function(thread.is_alive)

    def forget(self, model: str) -> None:
        """Report nothing more of a model that is no longer served."""
        for metric in (
            self._steps,
            self._batch_size,
            self._run_seconds,
            self._queue_seconds,
            self._sessions,
            self._pending,
        ):
            metric.remove(model)
        self._threads.remove(engine_thread_name(model))
        if self._triton is not None:
            self._triton.forget(model)

    def report_file_problem(self, model: str, problem: str) -> None:
        """Report that a model's file has a problem: "load_failed" or "changed_in_place"."""
        self._file_problems.labels(model, problem).set(1)

    def clear_file_problem(self, model: str, problem: str) -> None:
        """Report it no more."""
        self._file_problems.remove(model, problem)

    def report_device(self, device: Device) -> None:
        """Report where models run."""
        self._fell_back.set(device.fell_back)

    def report_transport(self, kind: str) -> None:
        """Report what carries gRPC."""
        self._transport.labels(kind).set(1)


class _TritonCollector(Collector):
    """The metrics that Triton's dashboards read, by Triton's names.

    These lack the ending `_total`, which the library gives every counter, so they go out without a type. Each number
    has one thread that changes it: a model's engine, or the event loop.
    """

    _DOCUMENTATION: ClassVar = {
        "nv_inference_request_success": "Requests of the inference protocol that succeeded.",
        "nv_inference_request_failure": "Requests of the inference protocol that failed, by reason.",
        "nv_inference_request_duration_us": "Time of the requests that succeeded, from arrival to answer.",
        "nv_inference_count": "Steps run, one for each session of a batch.",
        "nv_inference_exec_count": "Batches run, each one step of its sessions.",
        "nv_inference_queue_duration_us": "Time that requests waited for their first turn.",
    }

    def __init__(self) -> None:
        self._values: Tally[tuple[str, str, str]] = Tally()
        """By metric, model label and reason, "" for none."""

    def count_request(self, model: str, seconds: float, failure: Reason | None) -> None:
        if failure is not None:
            self._values["nv_inference_request_failure", model, failure] += 1
            return
        self._values["nv_inference_request_success", model, ""] += 1
        self._values["nv_inference_request_duration_us", model, ""] += round(seconds * 1e6)

    def count_batch(self, model: str, report: BatchReport) -> None:
        num_turns = len(report.turn_times_s)
        self._values["nv_inference_count", model, ""] += report.num_rows * num_turns
        self._values["nv_inference_exec_count", model, ""] += num_turns
        waited_us = round(sum(report.queue_times_s) * 1e6)
        self._values["nv_inference_queue_duration_us", model, ""] += waited_us

    def forget(self, model: str) -> None:
        for key in [key for key in self._values.copy() if key[1] == model]:
            del self._values[key]

    def collect(self) -> Iterator[Metric]:
        values = self._values.copy()  # in one go: whoever counts goes on meanwhile
        for name, documentation in self._DOCUMENTATION.items():
            metric = Metric(name, documentation, "unknown")
            for (counted, label, reason), value in sorted(values.items()):
                if counted == name:
                    model, _, version = label.rpartition("/")
                    labels = {"model": model, "version": version}
                    metric.add_sample(name, labels | ({"reason": reason} if reason else {}), value)
            yield metric
