"""Metrics: what Prometheus can scrape. Names and meanings stand in docs/serving.md."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.engine.engine import BatchReport
from server.runtime.provider import Device
from server.sessions.served_model import ServedModel

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """All of them, to be told."""
        r = self.registry
        self._calls = Counter(
            "ntm_calls", "Calls answered, by rpc and status code.", ["rpc", "code"], registry=r
        )
        self._call_seconds = Histogram(
            "ntm_call_seconds", "From a call's arrival to its answer.", ["rpc"], buckets=_SECONDS, registry=r
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

    def observe_commit(self, num_writes: int, seconds: float) -> None:
        """Count one commit to the store, of so many sessions' changes."""
        self._commit_writes.observe(num_writes)
        self._commit_seconds.observe(seconds)

    def count_call(self, rpc: str, code: str, seconds: float) -> None:
        """Count a call that was answered."""
        children = self._children.get((rpc, code))
        if children is None:
            children = self._children[rpc, code] = (
                self._calls.labels(rpc, code),
                self._call_seconds.labels(rpc),
            )
        children[0].inc()
        children[1].observe(seconds)

    def batch_observer(self, model: str) -> Callable[[BatchReport], None]:
        """What to call after each batch of a model."""
        steps, sizes = self._steps.labels(model), self._batch_size.labels(model)
        run_seconds, queue_seconds = self._run_seconds.labels(model), self._queue_seconds.labels(model)

        def observe(report: BatchReport) -> None:
            steps.inc(report.num_rows * len(report.turn_times_s))
            for turn_s in report.turn_times_s:
                sizes.observe(report.num_rows)
                run_seconds.observe(turn_s)
            for wait_s in report.queue_times_s:
                queue_seconds.observe(wait_s)

        return observe

    def watch(self, served: ServedModel) -> None:
        """Report a model's sessions and queue as they are when scraped."""
        label = served.model.label
        self._sessions.labels(label).set_function(lambda: served.num_sessions)
        self._pending.labels(label).set_function(lambda: served.num_pending)

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
