"""The client's channel against a server that says what it was sent."""

from __future__ import annotations

import itertools
from pathlib import Path

import grpc
import pytest

from ntm._channel import Tls, aio_channel, channel
from tests.server.security.authority import Authority


class Echo(grpc.GenericRpcHandler):
    """Answers every message with the token that came with it, and the name on the client's certificate."""

    def service(self, handler_call_details):
        def said(context):
            sent = dict(context.invocation_metadata()).get("authorization", "nothing")
            (name,) = context.auth_context().get("x509_common_name", [b"nobody"])
            return f"{sent} by {name.decode()}".encode()

        if handler_call_details.method.endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, context: (said(context) for _ in requests)
            )
        return grpc.unary_unary_rpc_method_handler(lambda request, context: said(context))


@pytest.fixture
def authority():
    return Authority()


@pytest.fixture
def serve():
    from concurrent.futures import ThreadPoolExecutor

    servers = []

    def start(credentials=None):
        server = grpc.server(ThreadPoolExecutor(4), handlers=[Echo()])
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        servers.append(server)
        return f"localhost:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.fixture
def tls_address(serve, authority):
    own = authority.issue("server")
    return serve(grpc.ssl_server_credentials([(own.key, own.pem)], authority.pem, require_client_auth=True))


@pytest.fixture
def tls(authority, tmp_path: Path):
    certificate, key = authority.issue("alice").write(tmp_path, "alice")
    return Tls(authority.write(tmp_path), certificate, key)


def sent_by_sync(address, tls, token):
    with channel(address, tls, token, []) as opened:
        unary = opened.unary_unary("/test/Unary")(b"", metadata=(("ntm-retry-safe", "1"),), timeout=5)
        stream = [*opened.stream_stream("/test/Stream")(iter([b"", b""]), timeout=5)]
    return [unary.decode(), *(each.decode() for each in stream)]


async def sent_by_aio(address, tls, token):
    async with aio_channel(address, tls, token, []) as opened:
        unary = await opened.unary_unary("/test/Unary")(b"", metadata=(("ntm-retry-safe", "1"),), timeout=5)
        stream = [each async for each in opened.stream_stream("/test/Stream")(iter([b"", b""]), timeout=5)]
    return [unary.decode(), *(each.decode() for each in stream)]


async def test_a_token_goes_with_every_call_over_loopback(serve):
    address = serve()

    assert sent_by_sync(address, False, "t") == ["Bearer t by nobody"] * 3
    assert await sent_by_aio(address, False, "t") == ["Bearer t by nobody"] * 3


async def test_a_function_gives_each_call_its_token(serve):
    address, numbers = serve(), itertools.count()

    def token():
        return str(next(numbers))

    assert sent_by_sync(address, False, token) == [f"Bearer {i} by nobody" for i in (0, 1, 1)]
    assert await sent_by_aio(address, False, token) == [f"Bearer {i} by nobody" for i in (2, 3, 3)]


async def test_tls_shows_the_clients_certificate_and_takes_the_token_along(tls_address, tls):
    assert sent_by_sync(tls_address, tls, "t") == ["Bearer t by alice"] * 3
    assert await sent_by_aio(tls_address, tls, None) == ["nothing by alice"] * 3


def test_a_server_of_another_authority_is_not_talked_to(tls_address, tls, tmp_path):
    foreign = Tls(Authority("foreign").write(tmp_path / "foreign"), tls.certificate, tls.key)

    with pytest.raises(grpc.RpcError) as failed:
        sent_by_sync(tls_address, foreign, "t")
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_server_of_another_name_is_not_talked_to(tls_address, tls):
    elsewhere = Tls(tls.authorities, tls.certificate, tls.key, server_name="elsewhere")

    with pytest.raises(grpc.RpcError):
        sent_by_sync(tls_address, elsewhere, "t")


@pytest.mark.parametrize("open_channel", [channel, aio_channel])
@pytest.mark.parametrize("address", ["example.com:50051", "10.0.0.1:50051"])
async def test_a_token_does_not_leave_the_machine_in_plain_sight(open_channel, address):
    with pytest.raises(ValueError, match="tls"):
        open_channel(address, False, "t", [])


def test_a_certificate_without_its_key_is_refused():
    with pytest.raises(ValueError, match="key"):
        Tls(certificate="alice.pem")
