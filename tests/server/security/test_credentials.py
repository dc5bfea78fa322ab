import asyncio
import base64
import socket
import ssl

import grpc
import pytest

from server.errors import SecurityFileError
from server.security.credentials import TlsFiles, TlsIdentity
from server.security.watched_files import WatchedFiles
from tests.server.security.authority import Authority


def identity(files):
    paths = [files.certificate, files.key]
    if files.client_authorities:
        paths.append(files.client_authorities)
    return TlsIdentity(files, WatchedFiles(paths, look_pause_s=0.0))


@pytest.fixture
def authority():
    return Authority()


@pytest.fixture
def files(tmp_path, authority):
    return TlsFiles(*authority.issue("server").write(tmp_path, "server"))


@pytest.fixture
async def serve():
    """Serves an echo over an identity; gives its port."""
    servers = []

    async def start(identity):
        async def echo(request, context):
            return request

        server = grpc.aio.server()
        handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        port = server.add_secure_port("127.0.0.1:0", identity.grpc_credentials())
        await server.start()
        servers.append(server)
        return port

    yield start
    for server in servers:
        await server.stop(None)


async def call(port, authority, client=None):
    """The code of a call by a client that believes an authority, with its certificate if it has one."""
    credentials = grpc.ssl_channel_credentials(
        authority.pem, client.key if client else None, client.pem if client else None
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
        try:
            await channel.unary_unary("/test/Echo")(b"", timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def name_shown(port, authority, **versions):
    """The name of the certificate that a server shows."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    for name, version in versions.items():
        setattr(context, name, version)
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return dict(pair for (pair,) in secured.getpeercert()["subject"])["commonName"]


async def test_a_client_that_believes_the_authority_is_served(serve, files, authority):
    port = await serve(identity(files))

    assert await call(port, authority) == grpc.StatusCode.OK


async def test_a_client_that_believes_another_authority_does_not_talk_to_the_server(serve, files):
    port = await serve(identity(files))

    assert await call(port, Authority("another")) == grpc.StatusCode.UNAVAILABLE


async def test_a_plaintext_client_is_not_served(serve, files):
    port = await serve(identity(files))

    async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary("/test/Echo")(b"", timeout=5)
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_with_authorities_of_clients_only_their_valid_certificates_open_a_connection(
    serve, files, authority, tmp_path
):
    mutual = TlsFiles(files.certificate, files.key, authority.write(tmp_path))
    port = await serve(identity(mutual))

    assert await call(port, authority, authority.issue("alice")) == grpc.StatusCode.OK
    assert await call(port, authority) == grpc.StatusCode.UNAVAILABLE
    assert await call(port, authority, authority.issue("alice", days=-1)) == grpc.StatusCode.UNAVAILABLE
    assert await call(port, authority, Authority("foreign").issue("alice")) == grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_that_is_replaced_is_shown_to_whoever_connects_next(serve, files, authority):
    port = await serve(identity(files))
    assert await asyncio.to_thread(name_shown, port, authority) == "server"

    authority.issue("its successor").write(files.certificate.parent, "server")

    assert await asyncio.to_thread(name_shown, port, authority) == "its successor"
    assert await call(port, authority) == grpc.StatusCode.OK


async def test_an_authority_that_is_replaced_decides_who_connects_next(serve, files, authority, tmp_path):
    mutual = TlsFiles(files.certificate, files.key, authority.write(tmp_path))
    port = await serve(identity(mutual))
    successor = Authority("successor")

    mutual.client_authorities.write_bytes(successor.pem)

    assert await call(port, authority, successor.issue("bob")) == grpc.StatusCode.OK
    assert await call(port, authority, authority.issue("alice")) == grpc.StatusCode.UNAVAILABLE


async def test_new_files_that_do_not_fit_together_leave_those_before_in_use(serve, files, authority):
    port = await serve(identity(files))

    files.certificate.write_bytes(authority.issue("another").pem)

    assert await asyncio.to_thread(name_shown, port, authority) == "server"
    assert await call(port, authority) == grpc.StatusCode.OK


@pytest.mark.filterwarnings("ignore:.*TLSv1.*:DeprecationWarning")
async def test_a_client_of_tls_1_1_is_refused(serve, files, authority):
    port = await serve(identity(files))
    at_least, at_most = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1

    with pytest.raises((ssl.SSLError, OSError)):
        await asyncio.to_thread(
            name_shown, port, authority, minimum_version=at_least, maximum_version=at_most
        )
    assert (
        await asyncio.to_thread(name_shown, port, authority, maximum_version=ssl.TLSVersion.TLSv1_2)
        == "server"
    )


def test_a_key_of_another_certificate_is_refused(files, authority):
    files.key.write_bytes(authority.issue("another").key)

    with pytest.raises(SecurityFileError, match="not the key of the certificate"):
        TlsIdentity(files)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("certificate", b"no certificate", "no certificate"),
        ("key", b"no key", "no private key"),
        ("certificate", b"", "no certificate"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_by_name(files, file, content, message):
    path = getattr(files, file)
    path.write_bytes(content)

    with pytest.raises(SecurityFileError, match=message) as refused:
        TlsIdentity(files)
    assert str(path) in str(refused.value)


def test_a_file_that_is_missing_or_a_directory_is_refused_by_name(files):
    files.key.unlink()
    with pytest.raises(SecurityFileError, match=r"server\.key cannot be used"):
        TlsIdentity(files)

    files.key.mkdir()
    with pytest.raises(SecurityFileError, match="not a file"):
        TlsIdentity(files)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a003020102", "a003020105"),  # version 6 of X.509, of which there are three
        ("06072a8648ce3d0201", "06072a8648ce3d0263"),  # a key of a kind that nobody knows
        ("06082a8648ce3d030107", "06082a8648ce3d030163"),  # a curve that nobody knows
    ],
)
def test_a_certificate_of_an_unknown_version_or_kind_is_refused_by_name(files, old, new):
    old, new = bytes.fromhex(old), bytes.fromhex(new)
    first = files.certificate.read_bytes().split(b"-----END")[0].split(b"-----\n")[1]
    der = base64.b64decode(first)
    assert old in der
    changed = base64.encodebytes(der.replace(old, new, 1))
    files.certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n" + changed + b"-----END CERTIFICATE-----\n")

    with pytest.raises(SecurityFileError, match="no certificate"):
        TlsIdentity(files)
