"""Valkey over TLS: through a proxy that ends it, since the test's own Valkey is built without."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import StoreError, StoreSettingsError
from server.storage.factory import open_store
from tests.server.security.authority import Authority
from tests.valkey import ValkeyServer


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def tls_port(valkey: ValkeyServer, authority: Authority, tmp_path: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("valkey").write(tmp_path, "valkey"))
    listener = socket.create_server(("0.0.0.0", 0))  # by 127.0.0.2 too, which is no name of the certificate

    def pipe(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                plain, _ = listener.accept()
                near = context.wrap_socket(plain, server_side=True)
            except ssl.SSLError:
                continue
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", valkey.port))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pipe, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_a_store_is_reached_over_tls_and_its_certificate_is_verified(
    tls_port: int, authority: Authority, tmp_path: Path
) -> None:
    url = f"rediss://localhost:{tls_port}/0?ssl_ca_certs={authority.write(tmp_path / 'ours')}"

    store = open_store(url, sync="normal")
    assert store.page("", 10, "") == []
    store.beat()
    store.close()


def test_a_store_with_a_certificate_of_another_authority_or_name_is_not_spoken_to(
    tls_port: int, authority: Authority, tmp_path: Path
) -> None:
    foreign = Authority("foreign").write(tmp_path / "foreign")
    for host, ca in (("localhost", foreign), ("127.0.0.2", authority.write(tmp_path / "ours"))):
        with pytest.raises((StoreError, StoreSettingsError)):
            open_store(f"rediss://{host}:{tls_port}/0?ssl_ca_certs={ca}", sync="normal")


def test_a_store_that_speaks_tls_is_not_spoken_to_in_plaintext(tls_port: int) -> None:
    with pytest.raises((StoreError, StoreSettingsError)):
        open_store(f"redis://localhost:{tls_port}/0", sync="normal")
