"""Launch: put the parts together, serve, and stop without losing anything.

Starting: models are loaded and checked and the store is opened first, so a server that listens can serve. Stopping:
health says NOT_SERVING, new calls are refused, streams that wait for their client end, calls in progress finish,
sessions are given back to the store, then the engines stop.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from time import monotonic

import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ntm.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from server.errors import ListenError, ModelFileError, ServingError, StoreSettingsError, StoreUnavailableError
from server.metrics import Metrics
from server.metrics_endpoint import MetricsEndpoint
from server.model import repository
from server.model.repository import ModelFile
from server.model.spec import StepModel
from server.model_watcher import ModelWatcher
from server.rpc import kserve, transport
from server.rpc.access import Access
from server.rpc.failures import Failures
from server.rpc.interceptors import CallInterceptor
from server.rpc.kserve import InferenceService
from server.rpc.model_service import ModelService
from server.rpc.native import NativeServer
from server.rpc.session_service import SessionService
from server.rpc.streaming import IdleStreams
from server.rpc.tracing import Tracing, check_is_installed, open_tracing
from server.rpc.validation import RequestLimits
from server.runtime import provider as device
from server.runtime.probe import load_runner
from server.runtime.provider import Device
from server.runtime.runner import ModelRunner
from server.runtime.slots import SlotPool
from server.security import Authenticator, Namespace, TlsIdentity
from server.sessions.executor import StepExecutor
from server.sessions.manager import SessionManager
from server.sessions.served_model import ServedModel, SessionLimits
from server.settings import ServerSettings
from server.storage.async_store import AsyncStore
from server.storage.factory import open_store, without_secrets
from server.storage.interface import Store

log = structlog.get_logger()

EXIT_THREAD_DIED = 70
"""The status of a process that ended since one of its threads did."""
EXIT_NOT_STOPPED_IN_TIME = 71
"""The status of a process that did not come to its end, say for a model that does not return."""
_STOP_MARGIN_S = 2.0
_THREAD_DEATH_PAUSE_S = 2.0
"""Time for probes and routers to see that health has turned. What was answered is in the store."""
_STORE_PAUSE_S = 1.0
_STORE_PAUSES_PER_WARNING = 30
_HOUSE_PAUSE_S = 10.0
_PURGE_PAUSE_S = 60.0
# How long the event loop keeps the interpreter from the engine that asks for it after a run: 5 ms, Python's own, is
# as long as the run; less than this only means that each takes it from the other in mid-work.
_SWITCH_INTERVAL_S = 5e-4

SERVICE_NAMES = [
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
]


class ModelLoader:
    """Puts models on the device and into service."""

    def __init__(
        self, settings: ServerSettings, device: Device, metrics: Metrics, executor: StepExecutor
    ) -> None:
        """Nothing is loaded."""
        self._settings = settings
        self._device = device
        self._metrics = metrics
        self._executor = executor

    def load(self, model: StepModel) -> ModelRunner:
        """Put a model on the device; may be called in a thread.

        Raises:
            ModelFileError, DeviceError.
        """
        return load_runner(model, self._device, self._num_slots, self._settings.max_batch_size)

    def serve(self, runner: ModelRunner) -> ServedModel:
        """Start a loaded model's engine; to be called in the event loop."""
        settings, model = self._settings, runner.model
        served = ServedModel(
            runner,
            SlotPool(self._num_slots),
            SessionLimits(
                settings.max_resident_sessions,
                settings.max_pending_messages,
                settings.retry_window_steps,
                settings.step_timeout_s,
                settings.max_queue_wait_s,
            ),
            self._executor.commit,
            self._metrics.batch_observer(model.label),
        )
        self._metrics.watch(served)
        log.info(
            "model loaded",
            model=model.label,
            digest=model.digest[:12],
            provider=self._device.provider,
            is_batch_invariant=runner.is_batch_invariant,
            rows=runner.rows_are_run,
            **runner.turn_times_ms,
            max_resident_sessions=settings.max_resident_sessions,
            pool_bytes=runner.num_rows * model.state_bytes,
        )
        return served

    @property
    def _num_slots(self) -> int:
        # Every session may hold a slot with its state and one with what it began from, and have a request at work in a
        # third.
        return 3 * self._settings.max_resident_sessions


@contextmanager
def _loading_limited(settings: ServerSettings, what: str) -> Iterator[None]:
    """Around what reads and tries out models at the start: a model that does not return must not hang it in silence."""

    def give_up() -> None:
        within = f"was not loaded and tried out within {settings.model_load_timeout_s} s"
        said = f"the server does not start: {what} {within}: take it out, or raise --model-load-timeout-s"
        print(said, file=sys.stderr, flush=True)
        os._exit(1)  # nothing else ends a call into ONNX Runtime

    timer = threading.Timer(settings.model_load_timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


async def build(settings: ServerSettings) -> Server:
    """A complete server that does not listen yet: every model loaded, the store open.

    Raises:
        StartupError: a model cannot be served, the device cannot be had, or the store cannot be used as asked.
    """
    metrics = Metrics(triton=settings.triton_metrics)
    authenticator, identity = settings.authenticator(), settings.tls_identity()
    if settings.otlp_endpoint is not None:
        check_is_installed()
    chosen_device = device.choose(settings.device, settings.device_id, settings.device_memory_limit_mib)
    metrics.report_device(chosen_device)
    chosen_transport = transport.choose(settings.transport, needs_tls=identity is not None)
    metrics.report_transport(chosen_transport.kind)
    skipped: dict[ModelFile, ModelFileError] = {}
    skips = settings.model_errors == "skip"
    with _loading_limited(settings, "the models directory"):
        files = repository.load_all(settings.models, skipped.__setitem__ if skips else None)
    store = await _open_store(settings, metrics)
    sessions = SessionManager(
        store,
        snapshot_every_steps=settings.snapshot_every_steps,
        recovery=settings.recovery,
        handover_timeout_s=settings.handover_timeout_s,
        idle_limit_s=settings.idle_limit_s,
        max_retired_ids=settings.max_retired_ids,
    )
    loader = ModelLoader(settings, chosen_device, metrics, sessions.executor)
    try:
        for file, model in [*files.items()]:
            try:
                with _loading_limited(settings, f"model {model.label}"):
                    runner = loader.load(model)
            except ModelFileError as error:
                if not skips:
                    raise
                skipped[file] = error
                del files[file]
            else:
                sessions.models.add(loader.serve(runner))
    except ServingError:
        await asyncio.to_thread(store.close)
        raise
    watcher = ModelWatcher(
        settings.models,
        files,
        sessions,
        metrics,
        loader.load,
        loader.serve,
        settings.unload_after_s,
        settings.model_load_timeout_s,
    )
    for file, problem in skipped.items():
        watcher.note_unloadable(file, problem)
    tracing = None
    if settings.otlp_endpoint is not None:
        tracing = open_tracing(settings.otlp_endpoint, metadata.version("ntm"))
    server = Server(
        settings,
        metrics,
        chosen_device,
        chosen_transport,
        sessions,
        watcher,
        authenticator,
        identity,
        tracing,
    )
    try:
        await _check_unowned_sessions(settings, store)
    except ServingError:
        await server.close()
        raise
    return server


class Server:
    """A server that runs in the current event loop."""

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        device: Device,
        chosen_transport: transport.Choice,
        sessions: SessionManager,
        model_watcher: ModelWatcher,
        authenticator: Authenticator,
        identity: TlsIdentity | None,
        tracing: Tracing | None,
    ) -> None:
        """Nothing listens yet; `build` makes the parts."""
        self._settings = settings
        self.metrics = metrics
        self._device = device
        self._transport = chosen_transport
        self.sessions = sessions
        self.model_watcher = model_watcher
        self._health = health.aio.HealthServicer()
        self._background: list[asyncio.Task[None]] = []
        self._authenticator = authenticator
        self._identity = identity
        self._tracing = tracing
        self._metrics_endpoint = MetricsEndpoint(metrics.registry, identity)
        failures = Failures(metrics)
        self.calls = CallInterceptor(metrics, authenticator, failures, tracing)
        limits = RequestLimits(
            settings.max_steps_per_message,
            settings.retry_window_steps,
            settings.max_sessions_per_batch,
            settings.max_message_bytes,
        )
        self.access = Access(sessions, authenticator, settings.quotas, settings.snapshot_every_steps, metrics)
        self._idle_streams = IdleStreams()
        self._session_service = SessionService(sessions, limits, self.access, self._idle_streams, failures)
        self._grpc = transport.make_server(
            chosen_transport.kind, self.calls, settings.max_message_bytes, settings.max_queue_wait_s
        )
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(self._session_service, self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(sessions, limits, chosen_transport.kind), self._grpc
        )
        self._inference = InferenceService(
            sessions,
            limits,
            self.access,
            metadata.version("ntm"),
            settings.sequence_idle_s,
            self._idle_streams,
            metrics,
            failures,
        )
        self._inference.add_to(self._grpc)
        if isinstance(self._grpc, NativeServer):
            step = f"/{SERVICE_NAMES[0]}/Step"
            self._grpc.add_direct_handler(
                step, self._session_service.step_directly, self._session_service.refuses_steps
            )
            self._grpc.never_refuse(kserve.PROBES)
        self._health_alone = transport.make_server("grpcio", None, settings.max_message_bytes)
        self._unstarted = [self._grpc, self._health_alone]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_alone)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            [*SERVICE_NAMES, kserve.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc
        )

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            ListenError: the address cannot be listened on; what was opened is closed.
        """
        settings = self._settings
        host = settings.listen.rpartition(":")[0]
        try:
            if self._identity is None:
                port = self._grpc.add_insecure_port(settings.listen)
            else:
                assert not isinstance(self._grpc, NativeServer)  # which `choose` does not give with TLS
                port = self._grpc.add_secure_port(settings.listen, self._identity.grpc_credentials())
        except RuntimeError as error:
            await self.close()
            raise ListenError(settings.listen) from error
        if settings.metrics_listen is not None:
            metrics_host, _, metrics_port = settings.metrics_listen.rpartition(":")
            try:
                await self._metrics_endpoint.start(metrics_host, int(metrics_port))
            except OSError as error:
                await self.close()
                raise ListenError(settings.metrics_listen) from error
        if settings.health_listen is not None:
            try:
                self._health_alone.add_insecure_port(settings.health_listen)
            except RuntimeError as error:
                await self.close()
                raise ListenError(settings.health_listen) from error
            self._unstarted.remove(self._health_alone)
            await self._health_alone.start()
        self._unstarted.remove(self._grpc)
        await self._grpc.start()
        for thread in (
            *self.sessions.store.threads,
            *(self._grpc.threads if isinstance(self._grpc, NativeServer) else ()),
        ):
            self.metrics.watch_thread(thread)
        self._background += [
            asyncio.create_task(self._keep_house()),
            asyncio.create_task(self.model_watcher.keep_looking(settings.model_poll_s)),
        ]
        for name in ["", *SERVICE_NAMES]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        backend = self.sessions.store.backend
        log.info(
            "listening",
            address=f"{host}:{port}",
            device=self._device.provider,
            transport=self._transport.kind,
            transport_reason=self._transport.reason,
            store=backend.kind,
            durability=backend.durability.value,
            is_encrypted=self._identity is not None,
            tells_callers_apart=self._authenticator.tells_apart,
            is_traced=self._tracing is not None,
        )
        if not backend.keeps_steps:
            log.warning("sessions are kept in memory only, and end with this process")
        return port

    async def turn_unhealthy(self) -> None:
        """Say that this server can serve no more."""
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Take no new work, finish what is in progress, and close."""
        log.info("stopping", drain_timeout_s=self._settings.drain_timeout_s)
        await self._health.enter_graceful_shutdown()
        self._idle_streams.stop()
        deadline_s = monotonic() + self._settings.drain_timeout_s
        is_drained = await self.calls.drain(self._settings.drain_timeout_s)
        if not is_drained:
            log.warning("calls still in progress are cut off", drain_timeout_s=self._settings.drain_timeout_s)
        # The grace is for answers on their way to slow readers.
        await self._grpc.stop(max(0.0, deadline_s - monotonic()))
        if self._health_alone not in self._unstarted:
            await self._health_alone.stop(None)
        self._metrics_endpoint.stop()
        for task in self._background:
            task.cancel()
        if is_drained and self.sessions.store.backend.keeps_steps:
            is_drained = await self.sessions.ownership.release_all(max(1.0, deadline_s - monotonic()))
            if not is_drained:
                log.warning("sessions not yet given back are found in the store as they are")
        await self.close(abandon=not is_drained)
        log.info("stopped")

    async def close(self, abandon: bool = False) -> None:
        """End the engines and close the store, of a server that does not listen."""
        while self._unstarted:
            # grpcio complains as the interpreter ends of a server that was never started.
            server = self._unstarted.pop()
            await server.start()
            await server.stop(None)
        for served in [*self.sessions.models, *self.model_watcher.unloading.values()]:
            await asyncio.to_thread(served.engine.close, abandon=abandon)
        await asyncio.to_thread(self.sessions.store.close)
        if self._tracing is not None:
            await self._tracing.close()

    async def _keep_house(self) -> None:
        """End idle sessions, and forget those that ended long ago."""
        idle_limit_s = self._settings.idle_limit_s
        purge_at_s = monotonic()
        while True:
            await asyncio.sleep(
                _HOUSE_PAUSE_S if idle_limit_s is None else min(idle_limit_s / 4, _HOUSE_PAUSE_S)
            )
            try:
                if idle_limit_s is not None:
                    await self.sessions.expire_idle()
                await self._inference.end_idle()
                if monotonic() >= purge_at_s:
                    await self.sessions.purge()
                    purge_at_s = monotonic() + _PURGE_PAUSE_S
            except ServingError as error:
                log.warning("idle and ended sessions are looked after later", error=str(error))


async def _check_unowned_sessions(settings: ServerSettings, store: AsyncStore) -> None:
    """Refuse to give the sessions without an owner to one who has others: those would be lost to it.

    Raises:
        StoreSettingsError, StoreError.
    """
    owner = settings.unowned_sessions_owner
    if owner and await store.count(*Namespace.of(owner).range, ""):
        raise StoreSettingsError(
            f"sessions in the store belong to {owner!r} already, and it would lose them to those without an owner: "
            "name another with --unowned-sessions-owner, or delete them first"
        )


async def _open_store(settings: ServerSettings, metrics: Metrics) -> AsyncStore:
    """Open the store; one that is not there yet is waited for.

    Raises:
        StoreSettingsError: it cannot be used as asked.
    """

    def opened() -> Store:
        return open_store(
            settings.store,
            sync=settings.sync,
            lease_s=settings.lease_s,
            timeout_s=settings.store_timeout_s,
            max_bytes=settings.store_limit_mib and settings.store_limit_mib * 2**20,
        )

    attempts = itertools.count()
    while True:
        try:
            store = await asyncio.to_thread(opened)
            return AsyncStore(store, opened, settings.lease_s / 3, metrics)
        except StoreUnavailableError as error:
            if next(attempts) % _STORE_PAUSES_PER_WARNING == 0:
                # Without what stands before the @ of the URL, which can be a password.
                log.warning(
                    "waiting for the session store: start it, or give another --store",
                    store=without_secrets(settings.store),
                    cause=str(error.__cause__ or error),
                )
            await asyncio.sleep(_STORE_PAUSE_S)


async def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then stop in good order.

    Raises:
        StartupError: the server cannot start.
    """
    server = await build(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_thread_death(died: threading.ExceptHookArgs) -> None:
        name = died.thread.name if died.thread is not None else "?"
        # First of all: whatever else fails, the process ends, and a supervisor starts it again.
        threading.Timer(_THREAD_DEATH_PAUSE_S, os._exit, [EXIT_THREAD_DIED]).start()
        loop.call_soon_threadsafe(lambda: asyncio.ensure_future(server.turn_unhealthy()))
        log.error("a thread died: the process ends", thread=name, exc_info=died.exc_value)

    threading.excepthook = on_thread_death
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await server.start()
    # What is there now stays. A full collection that looks through it takes 20 ms, in which nobody is answered.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    await stopping.wait()
    # A second signal stops at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    watchdog = threading.Timer(
        settings.drain_timeout_s + _STOP_MARGIN_S, os._exit, [EXIT_NOT_STOPPED_IN_TIME]
    )
    watchdog.daemon = True
    watchdog.start()
    await server.stop()
