"""The router's own file in a real Envoy, before real servers: TLS on both sides, by what `make secrets` makes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from ntm import Client, Tls
from ntm._errors import ClientError, from_rpc
from ntm.v1 import session_service_pb2
from tests.conftest import ROOT, ServerProcess
from tests.valkey import free_port

INPUTS = np.zeros((2, 3), np.float32)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    directory = tmp_path / "secrets"
    environment = {**os.environ, "NTM_SECRETS": str(directory)}
    subprocess.run([ROOT / "deploy" / "secrets.sh"], cwd=ROOT, env=environment, check=True)
    return directory


@pytest.fixture
def replica(start_server: Callable[..., ServerProcess], models: Path, secrets: Path) -> ServerProcess:
    tls = secrets / "tls" / "server"
    return start_server(
        models,
        *("--tls-cert", str(tls / "certificate.pem"), "--tls-key", str(tls / "key.pem")),
        *("--tls-client-ca", str(tls / "authority.pem"), "--tokens", str(secrets / "tokens")),
    )


class Router:
    """Envoy with the files of deploy/envoy, on free ports, before one replica."""

    def __init__(self, replica: ServerProcess, secrets: Path, directory: Path) -> None:
        self.port, self.stats_port = free_port(), free_port()
        replica_port = replica.address.rpartition(":")[2]
        replacements = {
            "/etc/envoy": str(directory),
            "/run/tls": str(secrets / "tls" / "router"),
            "address: replica, port_value: 50051": f"address: localhost, port_value: {replica_port}",
            "50052": str(self.port),
            "9902": str(self.stats_port),
            "9901": str(free_port()),
        }
        directory.mkdir()
        for file in (ROOT / "deploy" / "envoy").iterdir():
            text = file.read_text()
            for old, new in replacements.items():
                text = text.replace(old, new)
            (directory / file.name).write_text(text)
        envoy = Path(sys.executable).with_name("envoy")
        command = [envoy, "-c", str(directory / "envoy.yaml"), "--concurrency", "1", "--log-level", "warning"]
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--use-dynamic-base-id"], stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(timeout=20)


@pytest.fixture
def router(replica: ServerProcess, secrets: Path, tmp_path: Path) -> Iterator[Router]:
    router = Router(replica, secrets, tmp_path / "envoy")
    yield router
    router.stop()


def certificate_shown(port: int, authority: Path) -> str:
    """The serial number of the certificate that a port shows."""
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        shown = secured.getpeercert()
    assert shown is not None
    return str(shown["serialNumber"])


def test_clients_speak_tls_with_the_router_and_it_with_the_replicas(
    router: Router, replica: ServerProcess, secrets: Path
) -> None:
    tls, token = Tls(secrets / "authority.pem"), (secrets / "token").read_text()

    with (
        Client(f"localhost:{router.port}", tls=tls, token=token) as client,
        client.session("accumulator") as session,
    ):
        assert len(session.run(INPUTS)) == 2
        assert len([*session.stream([INPUTS, INPUTS])]) == 2
        assert [each.owner for each in client.sessions()] == ["operator"]

    # Whoever comes past the router has no certificate; whoever comes through it has no name of the router's.
    with (
        Client(
            replica.address.replace("127.0.0.1", "localhost"), tls=tls, token=token, retry_for_s=0.1
        ) as past,
        pytest.raises(ClientError) as refused,
    ):
        past.models()
    assert refused.value.code == grpc.StatusCode.UNAVAILABLE
    with (
        Client(f"localhost:{router.port}", tls=tls, retry_for_s=0.1) as nameless,
        pytest.raises(ClientError) as refused,
    ):
        nameless.models()
    assert refused.value.code == grpc.StatusCode.UNAUTHENTICATED
    context = ssl.create_default_context(cafile=str(secrets / "authority.pem"))
    url = f"https://localhost:{router.stats_port}/stats/prometheus"
    with urllib.request.urlopen(url, context=context) as answer:
        assert "envoy_cluster_upstream_rq" in answer.read().decode()


def test_the_router_shows_its_certificate_as_it_is_now(router: Router, secrets: Path) -> None:
    tls, token = Tls(secrets / "authority.pem"), (secrets / "token").read_text()
    with Client(f"localhost:{router.port}", tls=tls, token=token) as client:
        client.models()
    before = certificate_shown(router.port, secrets / "authority.pem")

    (secrets / "tls" / "router" / "certificate.pem").unlink()
    environment = {**os.environ, "NTM_SECRETS": str(secrets)}
    subprocess.run([ROOT / "deploy" / "secrets.sh"], cwd=ROOT, env=environment, check=True)

    for _ in range(2000):
        if certificate_shown(router.port, secrets / "authority.pem") != before:
            break
    else:
        raise AssertionError("the router still shows the certificate before")
    with Client(f"localhost:{router.port}", tls=tls, token=token) as client:
        client.models()


def test_secrets_that_are_there_stay_and_none_can_be_read_by_others(secrets: Path) -> None:
    files = {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()}
    environment = {**os.environ, "NTM_SECRETS": str(secrets)}

    subprocess.run([ROOT / "deploy" / "secrets.sh"], cwd=ROOT, env=environment, check=True)

    assert {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file()} == files
    assert secrets.stat().st_mode & 0o077 == 0
    assert (secrets / "token").read_text() not in (secrets / "tokens").read_text()
    assert len((secrets / "valkey_password").read_text()) >= 32
    assert re.search("sha256:[0-9a-f]{64}", (secrets / "tokens").read_text())
    assert shutil.which("openssl")


def test_the_router_names_each_call_and_keeps_the_name_that_its_caller_gives(
    router: Router, replica: ServerProcess, secrets: Path
) -> None:
    tls, token = Tls(secrets / "authority.pem"), (secrets / "token").read_text()
    with Client(f"localhost:{router.port}", tls=tls, token=token) as client:
        client.models()  # the router is up
        ids = []
        stub = client._connection.newest.sessions
        for named in ((), (("x-request-id", "order-7"),)):
            with pytest.raises(grpc.RpcError) as failed:
                stub.GetSession(session_service_pb2.GetSessionRequest(session_id="nobody"), metadata=named)
            ids.append(from_rpc(failed.value).request_id)

    uuid_of_the_router, own = ids
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuid_of_the_router)
    assert own == "order-7"
