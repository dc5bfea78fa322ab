"""Lifecycle: put the parts together, serve, and stop without losing anything.

Starting: models are loaded and checked and the store is opened first, so a server that listens can serve. Stopping:
health says NOT_SERVING, new calls are refused, streams that wait for their client end, calls in progress finish,
sessions are given back to the store, then the engines stop.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import signal
import sys
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
from server.errors import ListenError, ServingError, StoreSettingsError, StoreUnavailableError
from server.metrics import Metrics
from server.metrics_endpoint import MetricsEndpoint
from server.model import repository
from server.model.spec import StepModel
from server.model_watcher import ModelWatcher
from server.rpc import transport
from server.rpc.access import Access
from server.rpc.interceptors import CallInterceptor
from server.rpc.model_service import ModelService
from server.rpc.session_service import SessionService
from server.rpc.validation import RequestLimits
from server.runtime import provider as device
from server.runtime.probe import load_runner
from server.runtime.runner import ModelRunner
from server.runtime.slots import SlotPool
from server.security import Namespace
from server.sessions.manager import SessionManager
from server.sessions.served_model import ServedModel, SessionLimits
from server.settings import ServerSettings
from server.storage.commit_writer import CommitWriter
from server.storage.factory import open_store
from server.storage.interface import Store

log = structlog.get_logger()

_STORE_PAUSE_S = 1.0
_STORE_PAUSES_PER_WARNING = 30
_HOUSE_PAUSE_S = 10.0
_PURGE_PAUSE_S = 600.0
# How long the event loop keeps the interpreter from the engine that asks for it after a run: 5 ms, Python's own, is
# as long as the run; less than this only means that each takes it from the other in mid-work.
_SWITCH_INTERVAL_S = 5e-4

SERVICE_NAMES = [
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
]


class Server:
    """A server that runs in the current event loop."""

    def __init__(self, settings: ServerSettings) -> None:
        """Load every model; nothing listens yet, and the store is not open.

        Raises:
            StartupError: a model cannot be served, or the device cannot be had.
        """
        self._settings = settings
        self._metrics = Metrics()
        self._authenticator = settings.authenticator()
        self._identity = settings.tls_identity()
        self._metrics_endpoint = MetricsEndpoint(self._metrics.registry, self._identity)
        self._device = device.choose(settings.device, settings.device_id, settings.device_memory_limit_mib)
        self._metrics.report_device(self._device)
        loaded = repository.load_all(settings.models)
        self._served = {file: self._serve(self._put_on_device(model)) for file, model in loaded.items()}
        self.sessions: SessionManager
        self.access: Access
        self.model_watcher: ModelWatcher
        self._health = health.aio.HealthServicer()
        self._background: list[asyncio.Task[None]] = []
        self._calls = CallInterceptor(self._metrics, self._authenticator)
        self._transport = transport.choose(settings.transport, needs_tls=self._identity is not None)
        self._metrics.report_transport(self._transport.kind)
        self._grpc = transport.make_server(self._transport.kind, [self._calls], settings.max_message_bytes)
        self._health_alone = transport.make_server("grpcio", [], settings.max_message_bytes)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_alone)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            [*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc
        )

    async def start(self) -> int:
        """Open the store, and listen; returns the port.

        Raises:
            StoreSettingsError: the store cannot be used as asked. ListenError: the address cannot be listened on.
        """
        settings = self._settings
        journal = await self._open_journal()
        self.sessions = SessionManager(
            self._served.values(),
            journal,
            snapshot_every_steps=settings.snapshot_every_steps,
            recovery=settings.recovery,
            handover_timeout_s=settings.handover_timeout_s,
            idle_limit_s=settings.idle_limit_s,
        )
        self.model_watcher = ModelWatcher(
            settings.models,
            self._served,
            self.sessions,
            self._metrics,
            self._put_on_device,
            self._serve,
            settings.unload_after_s,
        )
        self._served = {}  # one that is unloaded is to leave nothing in memory
        limits = RequestLimits(
            settings.max_steps_per_message,
            settings.retry_window_steps,
            settings.max_sessions_per_batch,
            settings.max_message_bytes,
        )
        self.access = Access(
            self.sessions, self._authenticator, settings.quotas, settings.snapshot_every_steps
        )
        self._session_service = SessionService(self.sessions, limits, self.access)
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(self._session_service, self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(self.sessions, limits, self._transport.kind), self._grpc
        )
        await self._check_unowned_sessions()
        host = settings.listen.rpartition(":")[0]
        try:
            if self._identity is None:
                port = self._grpc.add_insecure_port(settings.listen)
            else:
                port = self._grpc.add_secure_port(settings.listen, self._identity.grpc_credentials())
        except RuntimeError as error:
            raise ListenError(settings.listen) from error
        if settings.metrics_listen is not None:
            metrics_host, _, metrics_port = settings.metrics_listen.rpartition(":")
            try:
                await self._metrics_endpoint.start(metrics_host, int(metrics_port))
            except OSError as error:
                raise ListenError(settings.metrics_listen) from error
        if settings.health_listen is not None:
            try:
                self._health_alone.add_insecure_port(settings.health_listen)
            except RuntimeError as error:
                raise ListenError(settings.health_listen) from error
            await self._health_alone.start()
        await self._grpc.start()
        self._background += [
            asyncio.create_task(self._keep_house()),
            asyncio.create_task(self.model_watcher.keep_looking(settings.model_poll_s)),
        ]
        for name in ["", *SERVICE_NAMES]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        store = journal.store
        log.info(
            "listening",
            address=f"{host}:{port}",
            device=self._device.provider,
            transport=self._transport.kind,
            transport_reason=self._transport.reason,
            store=store.kind,
            durability=store.durability.value,
            is_encrypted=self._identity is not None,
            tells_callers_apart=self._authenticator.tells_apart,
        )
        if not store.keeps_steps:
            log.warning("sessions are kept in memory only, and end with this process")
        return port

    async def stop(self) -> None:
        """Take no new work, finish what is in progress, and close."""
        log.info("stopping", drain_timeout_s=self._settings.drain_timeout_s)
        await self._health.enter_graceful_shutdown()
        self._session_service.stop_streams()
        deadline_s = monotonic() + self._settings.drain_timeout_s
        is_drained = await self._calls.drain(self._settings.drain_timeout_s)
        if not is_drained:
            log.warning("calls still in progress are cut off", drain_timeout_s=self._settings.drain_timeout_s)
        # The grace is for answers on their way to slow readers.
        await self._grpc.stop(max(0.0, deadline_s - monotonic()))
        await self._health_alone.stop(None)
        self._metrics_endpoint.stop()
        for task in self._background:
            task.cancel()
        if is_drained and self.sessions.journal.store.keeps_steps:
            is_drained = await self.sessions.release_all(max(1.0, deadline_s - monotonic()))
            if not is_drained:
                log.warning("sessions not yet given back are found in the store as they are")
        for served in [*self.sessions.models.values(), *self.model_watcher.unloading.values()]:
            await asyncio.to_thread(served.engine.close, abandon=not is_drained)
        await asyncio.to_thread(self.sessions.journal.close)
        log.info("stopped")

    @property
    def _num_slots(self) -> int:
        # Every session may hold one slot and have a message at work in another.
        return 2 * self._settings.max_resident_sessions

    def _put_on_device(self, model: StepModel) -> ModelRunner:
        return load_runner(model, self._device, self._num_slots, self._settings.max_batch_size)

    def _serve(self, runner: ModelRunner) -> ServedModel:
        settings, model = self._settings, runner.model
        served = ServedModel(
            runner,
            SlotPool(self._num_slots),
            SessionLimits(
                settings.max_resident_sessions,
                settings.max_pending_messages,
                settings.retry_window_steps,
            ),
            asyncio.get_running_loop(),
            self._metrics.batch_observer(model.label),
        )
        self._metrics.watch(served)
        log.info(
            "model loaded",
            model=model.label,
            digest=model.digest[:12],
            provider=self._device.provider,
            is_batch_invariant=runner.is_batch_invariant,
            max_resident_sessions=settings.max_resident_sessions,
            pool_bytes=runner.num_rows * model.state_bytes,
        )
        return served

    async def _open_journal(self) -> CommitWriter:
        """Open the store; one that is not there yet is waited for."""
        settings = self._settings

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
                return CommitWriter(store, opened, settings.lease_s / 3, self._metrics.observe_commit)
            except StoreUnavailableError as error:
                if next(attempts) % _STORE_PAUSES_PER_WARNING == 0:
                    # Without what stands before the @ of the URL, which can be a password.
                    log.warning(
                        "waiting for the session store: start it, or give another --store",
                        store=re.sub(r"//.*@", "//", settings.store),
                        cause=str(error.__cause__ or error),
                    )
                await asyncio.sleep(_STORE_PAUSE_S)

    async def _check_unowned_sessions(self) -> None:
        """Refuse to give the sessions without an owner to one who has others: those would be lost to it.

        Raises:
            SecurityFileError, StoreError.
        """
        owner = self._settings.unowned_sessions_owner
        if owner and await self.sessions.journal.count(*Namespace.of(owner).range, ""):
            raise StoreSettingsError(
                f"sessions in the store belong to {owner!r} already, and it would lose them to those without an owner: "
                "name another with --unowned-sessions-owner, or delete them first"
            )

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
                if monotonic() >= purge_at_s:
                    await self.sessions.purge()
                    purge_at_s = monotonic() + _PURGE_PAUSE_S
            except ServingError as error:
                log.warning("idle and ended sessions are looked after later", error=str(error))


async def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then stop in good order.

    Raises:
        StartupError: the server cannot start.
    """
    server = Server(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
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
    await server.stop()
