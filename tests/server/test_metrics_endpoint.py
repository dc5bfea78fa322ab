import asyncio
import socket
import ssl
import threading
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from server.metrics_endpoint import MetricsEndpoint
from server.security import TlsFiles, TlsIdentity
from server.security.watched_files import WatchedFiles
from tests.server.security.authority import Authority


@pytest.fixture
def registry():
    registry = CollectorRegistry()
    Counter("ntm_steps", "Steps run.", registry=registry).inc(7)
    return registry


@pytest.fixture
async def start(registry):
    endpoints = []

    async def start(identity=None):
        endpoints.append(MetricsEndpoint(registry, identity))
        return await endpoints[-1].start("127.0.0.1", 0)

    yield start
    for endpoint in endpoints:
        endpoint.stop()


def get(url, context=None):
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:
        return answer.read().decode()


async def test_metrics_are_told_over_http(start):
    port = await start()

    assert "ntm_steps_total 7.0" in await asyncio.to_thread(get, f"http://127.0.0.1:{port}/metrics")


async def test_another_path_is_not_found(start):
    port = await start()

    with pytest.raises(urllib.error.HTTPError, match="404"):
        await asyncio.to_thread(get, f"http://127.0.0.1:{port}/secrets")


async def test_connections_that_say_nothing_cost_no_thread_and_do_not_keep_others_from_being_answered(start):
    port = await start()
    num_threads = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]

    said = await asyncio.to_thread(get, f"http://127.0.0.1:{port}/metrics")

    assert "ntm_steps_total" in said
    assert threading.active_count() <= num_threads + 2  # the two that this test and the encoder run in
    for each in silent:
        each.close()


async def test_silent_connections_end_by_themselves(start, monkeypatch):
    monkeypatch.setattr("server.metrics_endpoint._TIMEOUT_S", 0.1)
    port = await start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    try:
        said = await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        said = b""

    assert said == b""
    writer.close()


async def test_metrics_are_told_over_tls_with_the_certificate_as_it_is_now(start, tmp_path):
    authority = Authority()
    files = TlsFiles(*authority.issue("server").write(tmp_path, "server"), authority.write(tmp_path))
    paths = [files.certificate, files.key, files.client_authorities]
    port = await start(TlsIdentity(files, WatchedFiles(paths, look_pause_s=0.0)))
    own = authority.issue("prometheus").write(tmp_path, "prometheus")
    context = ssl.create_default_context(cadata=authority.pem.decode())
    url = f"https://localhost:{port}/metrics"

    with pytest.raises(OSError):  # noqa: PT011  # an alert or a reset, as the race has it
        await asyncio.to_thread(get, url, context)
    context.load_cert_chain(*own)
    assert "ntm_steps_total" in await asyncio.to_thread(get, url, context)

    successor = Authority("successor")
    successor.issue("server").write(tmp_path, "server")
    files.client_authorities.write_bytes(successor.pem)

    with pytest.raises(OSError):  # noqa: PT011
        await asyncio.to_thread(get, url, context)
    newer = ssl.create_default_context(cadata=successor.pem.decode())
    newer.load_cert_chain(*successor.issue("prometheus").write(tmp_path, "newer"))
    assert "ntm_steps_total" in await asyncio.to_thread(get, url, newer)
