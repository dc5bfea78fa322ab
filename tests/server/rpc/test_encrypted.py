"""The whole server over TLS, and who it believes: real processes, real handshakes."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from ntm import AsyncClient, Client, Tls
from ntm._errors import ClientError
from server.security.tokens import line_of
from tests.conftest import ROOT, ServerProcess
from tests.server.security.authority import Authority
from tests.valkey import free_port

INPUTS = np.zeros((2, 3), np.float32)
StartServer = Callable[..., ServerProcess]


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def tls_flags(authority: Authority, tmp_path: Path) -> list[str]:
    certificate, key = authority.issue("server").write(tmp_path / "server", "server")
    return ["--tls-cert", str(certificate), "--tls-key", str(key)]


def trusting(authority: Authority, folder: Path, name: str = "") -> Tls:
    """A client's side; with a certificate for a name."""
    folder.mkdir(parents=True, exist_ok=True)
    own = authority.issue(name).write(folder, name) if name else (None, None)
    return Tls(authority.write(folder), *own)


def at_localhost(server: ServerProcess) -> str:
    return server.address.replace("127.0.0.1", "localhost")


def test_a_session_runs_over_tls_with_a_token(
    start_server: StartServer, models: Path, authority: Authority, tls_flags: list[str], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(line_of("alice", "a-token"))
    server = start_server(models, *tls_flags, "--tokens", str(tokens))
    tls = trusting(authority, tmp_path / "client")

    with (
        Client(at_localhost(server), tls=tls, token="a-token") as client,
        client.session("accumulator") as session,
    ):
        assert len(session.run(INPUTS)) == 2
        assert len([*session.stream([INPUTS, INPUTS])]) == 2
        assert [each.owner for each in client.sessions()] == ["alice"]

    with (
        Client(at_localhost(server), tls=tls, token="another", retry_for_s=0.1) as client,
        pytest.raises(ClientError) as refused,
    ):
        client.models()
    assert refused.value.code == grpc.StatusCode.UNAUTHENTICATED


async def test_certificates_name_the_principals_where_there_are_no_tokens(
    start_server: StartServer, models: Path, authority: Authority, tls_flags: list[str], tmp_path: Path
) -> None:
    flags = [*tls_flags, "--tls-client-ca", str(authority.write(tmp_path))]
    server = await asyncio.to_thread(start_server, models, *flags)
    alice, bob = (trusting(authority, tmp_path / name, name) for name in ("alice", "bob"))

    async with (
        AsyncClient(at_localhost(server), tls=alice) as of_alice,
        AsyncClient(at_localhost(server), tls=bob) as of_bob,
    ):
        session = await of_alice.session("accumulator", session_id="s")
        await session.run(INPUTS)
        with pytest.raises(ClientError) as refused:
            await of_bob.attach("s")
        assert refused.value.code == grpc.StatusCode.NOT_FOUND
        assert [each.owner async for each in of_alice.sessions()] == ["alice"]

    strangers = {
        "no certificate": trusting(authority, tmp_path / "none"),
        "one that has ended": _ended(authority, tmp_path / "ended"),
        "one of another authority": _foreign(authority, tmp_path / "foreign"),
    }
    for what, tls in strangers.items():
        async with AsyncClient(at_localhost(server), tls=tls, retry_for_s=0.1, timeout_s=5.0) as stranger:
            with pytest.raises(ClientError) as refused:
                await stranger.models()
            assert refused.value.code == grpc.StatusCode.UNAVAILABLE, what


def _ended(authority: Authority, folder: Path) -> Tls:
    return Tls(authority.write(folder), *authority.issue("alice", days=-1).write(folder, "alice"))


def _foreign(authority: Authority, folder: Path) -> Tls:
    return Tls(authority.write(folder), *Authority("foreign").issue("alice").write(folder, "alice"))


def test_a_certificate_replaced_while_it_serves_is_what_new_connections_see_and_old_ones_go_on(
    start_server: StartServer, models: Path, authority: Authority, tls_flags: list[str], tmp_path: Path
) -> None:
    server = start_server(models, *tls_flags)
    with Client(at_localhost(server), tls=trusting(authority, tmp_path / "old")) as before:
        session = before.session("accumulator")
        session.run(INPUTS)

        successor = Authority("successor")
        successor.issue("server").write(tmp_path / "server", "server")
        new = trusting(successor, tmp_path / "new")
        with Client(at_localhost(server), tls=new, retry_for_s=20.0) as after:
            assert after.attach(session.session_id).next_step == 2
        session.run(INPUTS)


def test_a_token_taken_out_of_the_file_is_refused_while_the_server_runs(
    start_server: StartServer, models: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(line_of("alice", "a-token") + "\n" + line_of("bob", "b-token"))
    server = start_server(models, "--tokens", str(tokens))
    with Client(server.address, token="a-token") as client:
        client.models()

        tokens.write_text(line_of("bob", "b-token"))

        def is_refused() -> bool:
            try:
                client.models()
            except ClientError as error:
                return error.code == grpc.StatusCode.UNAUTHENTICATED
            return False

        deadline_s = time.monotonic() + 20
        while not is_refused():
            assert time.monotonic() < deadline_s, "the token still works"


def test_metrics_and_health_beside_tls(
    start_server: StartServer, models: Path, authority: Authority, tls_flags: list[str], tmp_path: Path
) -> None:
    import ssl

    metrics_port, health_port = free_port(), free_port()
    start_server(
        models,
        *tls_flags,
        *("--metrics-listen", f"127.0.0.1:{metrics_port}", "--health-listen", f"127.0.0.1:{health_port}"),
    )
    context = ssl.create_default_context(cadata=authority.pem.decode())

    with urllib.request.urlopen(f"https://localhost:{metrics_port}/metrics", context=context) as answer:
        assert "ntm_calls" in answer.read().decode()
    command = [sys.executable, "-m", "server.rpc.health", f"127.0.0.1:{health_port}"]
    assert "SERVING" in subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    with (
        grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary("/ntm.v1.SessionService/ListSessions")(b"", timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--listen", "0.0.0.0:0"], r"--?listen|listen.*insecure"),
        (["--metrics-listen", "0.0.0.0:0"], "insecure"),
        (["--tls-cert", "a.pem"], "go together"),
        (["--tls-client-ca", "a.pem"], "tls_cert"),
        (["--jwt-issuer", "i"], "go together"),
        (
            ["--jwt-issuer", "i", "--jwt-audience", "a", "--jwt-keys", "k", "--jwt-algorithms", "HS256"],
            "HS256",
        ),
        (["--jwt-issuer", "i", "--jwt-audience", "a", "--jwt-keys", "k", "--jwt-algorithms", "none"], "none"),
        (["--admins", "root"], "tokens"),
    ],
)
def test_settings_that_would_leave_a_door_open_are_refused_by_name(flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "server", "--store", "none", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)

    assert ended.returncode == 2
    assert re.search(said, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("flag", ["--tokens", "--tls-cert", "--jwt-keys"])
def test_a_file_that_is_not_there_stops_the_start_with_its_name(
    models: Path, flag: str, tmp_path: Path
) -> None:
    more = {
        "--tokens": [],
        "--tls-cert": ["--tls-key", str(tmp_path / "key")],
        "--jwt-keys": ["--jwt-issuer", "i", "--jwt-audience", "a"],
    }[flag]
    command = [sys.executable, "-m", "server", "--models", str(models), "--store", "none"]
    command += [flag, str(tmp_path / "missing"), *more]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)

    assert ended.returncode == 1
    assert str(tmp_path / "missing") in ended.stderr
    assert "Traceback" not in ended.stderr
