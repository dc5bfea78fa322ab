"""The client finds its replica itself: what addresses mean, and replicas killed, replaced and added under load."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health, health_pb2_grpc

import ntm._async.client
import ntm._sync.client
from benchmarks.peers import envoy
from ntm import AsyncClient, Client
from ntm import _requests as requests
from ntm._channel import Tls, channel
from ntm._routing import Address, target
from tests.compose.load import MODEL, Load, load
from tests.conftest import ROOT, ServerProcess
from tests.server.helpers import accumulated, random_inputs
from tests.valkey import ValkeyServer, free_port

Start = Callable[..., ServerProcess]

LOOKUP_S = 0.2


class TestAddresses:
    def test_host_and_port_are_one_server(self) -> None:
        found = target("example.org:50051")

        assert (found.name, found.hosts, found.is_routed) == ("example.org:50051", ("example.org",), False)

    def test_a_dns_name_is_replicas_whose_addresses_may_change(self) -> None:
        found = target("dns:///ntm:50051")

        assert (found.name, found.hosts) == ("dns:///ntm:50051", ("ntm",))
        assert found.is_routed
        assert found.is_looked_up

    def test_a_list_is_replicas_that_stay(self) -> None:
        found = target(["127.0.0.1:1", "localhost:2"])

        assert (found.name, found.hosts) == ("ipv4:127.0.0.1:1,127.0.0.1:2", ("127.0.0.1", "localhost"))
        assert found.is_routed
        assert not found.is_looked_up
        assert target(["[::1]:1"]).name == "ipv6:[::1]:1"

    @pytest.mark.parametrize(
        ("addresses", "complaint"),
        [
            ([], "at least one HOST:PORT"),
            (["127.0.0.1"], "'127.0.0.1' in the list of addresses is not HOST:PORT"),
            (["dns:///ntm:50051"], "not HOST:PORT"),
            (["127.0.0.1:1", "[::1]:2"], "of IPv4 and of IPv6"),
        ],
    )
    def test_a_list_that_names_no_servers_is_refused(self, addresses: list[str], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            Client(addresses)

    def test_a_token_goes_to_replicas_of_this_machine_alone_in_plain_sight(self) -> None:
        with pytest.raises(ValueError, match="plain sight"):
            Client("dns:///ntm:50051", token="t")
        with pytest.raises(ValueError, match="plain sight"):
            Client(["127.0.0.1:1", "10.0.0.1:1"], token="t")
        Client(["127.0.0.1:1"], token="t").close()

    def test_by_tls_the_servers_of_a_list_need_a_name(self) -> None:
        with pytest.raises(ValueError, match="server_name"):
            channel(["127.0.0.1:1"], True, None)
        channel(["127.0.0.1:1"], Tls(server_name="ntm"), None).close()


class NameServer:
    """Answers each question for a name with the addresses that it has now."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.sendto(b"", self._socket.getsockname())

    def _serve(self) -> None:
        while True:
            question, asker = self._socket.recvfrom(512)
            if not question:
                self._socket.close()
                return
            end = question.index(b"\0", 12) + 5
            (kind,) = struct.unpack_from(">H", question, end - 4)
            found = self.addresses if kind == 1 else []
            answers = [
                b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(address)
                for address in found
            ]
            header = question[:2] + struct.pack(">HHHHH", 0x8180, 1, len(answers), 0, 0)
            self._socket.sendto(header + question[12:end] + b"".join(answers), asker)


class Replicas:
    """Servers on one Valkey, each on its own address of this machine, and the name that leads to those that run.

    As a headless service of Kubernetes does, the name leads to a server from when it listens until it is told to stop.
    """

    def __init__(self, names: NameServer, models: Path, store: str) -> None:
        self._names = names
        self._models = models
        self._store = store
        self.port = free_port()
        self._running: dict[str, ServerProcess] = {}
        self._num_started = 0
        self.address = f"dns://{names.address}/ntm.test:{self.port}"

    def add(self) -> None:
        self._num_started += 1
        self._start(f"127.0.0.{10 + self._num_started}")

    def stop(self, index: int = 0) -> None:
        """In good order."""
        host = self._hosts[index]
        self._names.addresses.remove(host)
        self._running.pop(host).stop()

    def kill(self, index: int = 0) -> None:
        host = self._hosts[index]
        self._names.addresses.remove(host)
        process = self._running.pop(host)
        process.signal(signal.SIGKILL)
        process.wait()

    def stop_all(self) -> None:
        for process in self._running.values():
            process.stop()

    @property
    def _hosts(self) -> list[str]:
        return list(self._running)

    def _start(self, host: str) -> None:
        flags = ["--lease-s", "1", "--max-resident-sessions", "100", "--sync", "normal"]
        self._running[host] = ServerProcess(
            self._models, *flags, listen=f"{host}:{self.port}", store=self._store
        )
        self._names.addresses.append(host)


def owners(valkey: ValkeyServer, session_ids: list[str]) -> dict[str, bytes | None]:
    """Which replica has each session, as the store has it."""
    with valkey.client() as client:
        return {name: client.hget(f"ntm:session:{name}", "owner") for name in session_ids}  # type: ignore[misc]


@pytest.fixture
def names() -> Iterator[NameServer]:
    names = NameServer()
    yield names
    names.close()


@pytest.fixture
def replicas(
    names: NameServer, tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Replicas]:
    """Two, and clients that look the name up often."""
    shutil.copytree(ROOT / "models" / MODEL, tmp_path / MODEL)
    for module in (ntm._async.client, ntm._sync.client):
        monkeypatch.setattr(module, "LOOKUP_INTERVAL_S", LOOKUP_S)
    replicas = Replicas(names, tmp_path, valkey.url)
    replicas.add()
    replicas.add()
    yield replicas
    replicas.stop_all()


async def go_on(running: Load, num_calls: int = 100) -> None:
    """Wait until the load has had so many more answers."""
    end = running.account.calls + num_calls
    while running.account.calls < end:
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def loaded(replicas: Replicas) -> AsyncIterator[Load]:
    async with load(replicas.address, {}) as running:
        await go_on(running)
        yield running


@pytest.mark.timeout(300)
async def test_a_killed_replicas_sessions_go_on_at_another_and_no_call_fails(replicas: Replicas) -> None:
    async with loaded(replicas) as running:
        await asyncio.to_thread(replicas.kill)
        await go_on(running, 200)
        await asyncio.to_thread(replicas.add)
        await go_on(running, 200)
        account = await running.end()

    assert account.is_clean, account


@pytest.mark.timeout(300)
async def test_replicas_are_replaced_one_by_one_and_no_call_fails(replicas: Replicas) -> None:
    async with loaded(replicas) as running:
        for _ in range(2):
            await asyncio.to_thread(replicas.add)
            await go_on(running)
            await asyncio.to_thread(replicas.stop)
            await go_on(running)
        account = await running.end()

    assert account.is_clean, account


@pytest.mark.timeout(300)
async def test_replicas_that_are_added_get_sessions_and_those_that_go_give_theirs_back(
    replicas: Replicas, valkey: ValkeyServer
) -> None:
    async with loaded(replicas) as running:
        two = owners(valkey, running.session_ids)
        await asyncio.to_thread(replicas.add)
        await asyncio.to_thread(replicas.add)
        await go_on(running, 400)
        four = owners(valkey, running.session_ids)
        await asyncio.to_thread(replicas.stop, 3)
        await asyncio.to_thread(replicas.stop, 2)
        await go_on(running, 200)
        again = owners(valkey, running.session_ids)
        account = await running.end()

    assert account.is_clean, account
    assert (len(set(two.values())), len(set(again.values()))) == (2, 2)
    assert len(set(four.values())) > 2


def test_calls_of_a_session_go_to_one_replica_of_a_list(
    start_server: Start, models: Path, valkey: ValkeyServer
) -> None:
    servers = [start_server(models, "--sync", "normal", store=valkey.url) for _ in range(3)]
    inputs = random_inputs(5)

    with Client([server.address for server in servers]) as c:
        sessions = [c.session("accumulator") for _ in range(30)]
        placed = owners(valkey, [s.session_id for s in sessions])
        for session in sessions:
            np.testing.assert_array_equal(session.run(inputs), accumulated(inputs))
            np.testing.assert_array_equal(
                np.concatenate(list(session.stream([inputs[:2], inputs[2:]]))),
                accumulated(np.concatenate([inputs, inputs]))[5:],
            )
        batch = c.batch_step(sessions, np.stack([inputs] * 30))
        assert placed == owners(valkey, [s.session_id for s in sessions])
        assert len(list(c.sessions())) == 30

    assert batch.errors == {}
    assert len(Counter(placed.values())) == 3


def test_a_replica_that_stops_gets_no_more_calls_while_it_finishes_those_it_has(
    start_server: Start, models: Path, valkey: ValkeyServer
) -> None:
    servers = [start_server(models, "--sync", "normal", store=valkey.url) for _ in range(2)]
    inputs = random_inputs(40)

    with Client([server.address for server in servers], retry_for_s=0) as c:
        sessions = [c.session("accumulator") for _ in range(10)]
        for session in sessions:
            session.run(inputs[:1])
        servers[0].signal(signal.SIGTERM)
        servers[0].wait()
        outputs = [session.run(inputs[1:]) for session in sessions]

    for output in outputs:
        np.testing.assert_array_equal(output, accumulated(inputs)[1:])


class Named(grpc.GenericRpcHandler):
    """Answers every call with its own name."""

    def __init__(self, name: bytes) -> None:
        self._name = name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if "Health" in handler_call_details.method:
            return None
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self._name)


@pytest.fixture
def three_named() -> Iterator[list[str]]:
    """The addresses of three servers that say who they are, and that they are healthy."""
    servers, addresses = [], []
    for name in (b"a", b"b", b"c"):
        server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Named(name)])
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()
        servers.append(server)
    yield addresses
    for server in servers:
        server.stop(None)


def test_the_client_and_envoy_choose_the_same_replica_for_each_session(three_named: list[str]) -> None:
    def chosen(address: Address) -> list[bytes]:
        with channel(address, False, None) as opened:
            call = opened.unary_unary("/any/Call")
            before: list[bytes] = []
            while True:
                answers = [
                    call(b"", metadata=requests.metadata(f"session {n}"), timeout=10) for n in range(100)
                ]
                if len(set(answers)) == 3 and answers == before:  # all were known to be healthy throughout
                    return answers
                before = answers

    with envoy.routing(three_named) as (router, _):
        assert chosen(router) == chosen(three_named)


def test_looking_a_name_up_again_makes_no_new_connection(replicas: Replicas) -> None:
    def connections() -> set[tuple[int, int]]:
        return {
            (entry.laddr.port, entry.raddr.port)
            for entry in psutil.Process().net_connections("tcp")
            if entry.status == psutil.CONN_ESTABLISHED and entry.raddr.port == replicas.port
        }

    with Client(replicas.address) as c:
        for _ in range(20):
            c.session("copy")
        before, first = connections(), c._connection._newest
        while c._connection._newest is first:
            c.models()
        for _ in range(20):
            c.session("copy")

        assert len(before) == 2
        assert connections() == before


async def test_the_asyncio_client_closes_the_channels_that_it_no_longer_uses(
    names: NameServer, start_server: Start, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ntm._async.client, "LOOKUP_INTERVAL_S", 0.01)
    server = start_server(models)
    names.addresses.append("127.0.0.1")
    address = f"dns://{names.address}/ntm.test:{server.address.rpartition(':')[2]}"

    async with AsyncClient(address, retry_for_s=0.05, timeout_s=0.5) as c:
        for _ in range(200):
            await c.models()
            await asyncio.sleep(0.01)
        assert len(c._connection._earlier) < 100
