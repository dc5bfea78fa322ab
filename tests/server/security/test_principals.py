import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.errors import PermissionDeniedError, UnauthenticatedError
from server.security.jwts import JwtIssuer, JwtVerifier
from server.security.loopback import is_loopback
from server.security.namespaces import BARE, EVERYBODY, Namespace
from server.security.principals import ANONYMOUS, Authenticator
from server.security.tokens import TokenFile, line_of
from tests.server.security.authority import Authority


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("\n".join([line_of("alice", "a"), line_of("bob", "b"), line_of("root", "r")]))
    return TokenFile(path)


def bearer(token):
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def shown(certificate):
    return {"x509_pem_cert": [certificate.pem], "x509_common_name": [b"what gRPC says"]}


async def test_without_any_means_to_tell_callers_apart_all_are_one():
    caller = await Authenticator().authenticate([], {})

    assert caller.principal == ANONYMOUS


async def test_a_token_says_who_calls(tokens):
    caller = await Authenticator(tokens=tokens).authenticate(bearer("a"), {})

    assert caller.principal.name == "alice"
    assert caller.principal.namespace == Namespace.of("alice")


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        bearer("unknown"),
        bearer(""),
        bearer("a" * 20_000),
        [("authorization", "Basic YQ==")],
        [("authorization", "a")],
        [("authorization", b"Bearer a")],
        bearer("a") + bearer("b"),
    ],
)
async def test_a_call_without_one_good_token_is_refused(tokens, metadata):
    with pytest.raises(UnauthenticatedError):
        await Authenticator(tokens=tokens).authenticate(metadata, {})


async def test_a_certificate_says_who_calls_where_there_are_no_tokens():
    authenticator = Authenticator(certificates=True)

    caller = await authenticator.authenticate([], shown(Authority().issue("alice")))

    assert caller.principal.name == "alice"


async def test_a_certificate_without_a_common_name_goes_by_its_first_other_name():
    authenticator = Authenticator(certificates=True)

    assert (await authenticator.authenticate([], shown(Authority().issue("")))).principal.name != ""


async def test_a_certificate_that_ends_while_its_connection_lasts_is_refused():
    authenticator = Authenticator(certificates=True)

    with pytest.raises(UnauthenticatedError, match="ended"):
        await authenticator.authenticate([], shown(Authority().issue("alice", days=-1)))


async def test_no_certificate_is_refused():
    with pytest.raises(UnauthenticatedError):
        await Authenticator(certificates=True).authenticate([], {})


async def test_where_there_are_tokens_a_certificate_alone_is_nobodys_name(tokens):
    authenticator = Authenticator(tokens=tokens, certificates=True)
    router = shown(Authority().issue("router"))

    with pytest.raises(UnauthenticatedError):
        await authenticator.authenticate([], router)
    assert (await authenticator.authenticate(bearer("b"), router)).principal.name == "bob"


async def test_tokens_and_jwts_can_be_used_side_by_side(tokens, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "key.pem"
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    authenticator = Authenticator(tokens=tokens, jwts=JwtVerifier(JwtIssuer("i", "a", str(path))))
    token = jwt.encode({"sub": "carol", "iss": "i", "aud": "a", "exp": 2**33}, key, "ES256")

    assert (await authenticator.authenticate(bearer(token), {})).principal.name == "carol"
    assert (await authenticator.authenticate(bearer("a"), {})).principal.name == "alice"
    with pytest.raises(UnauthenticatedError):
        await authenticator.authenticate(bearer("neither"), {})


@pytest.mark.parametrize("name", ["", "-", "a\nb", "a" * 129])
def test_a_name_that_could_mislead_is_nobodys(name):
    with pytest.raises(UnauthenticatedError):
        Authenticator().principal(name)


async def test_sessions_without_an_owner_belong_to_the_one_that_is_named(tokens):
    authenticator = Authenticator(tokens=tokens, unowned_sessions_owner="alice")

    assert (await authenticator.authenticate(bearer("a"), {})).principal.namespace == BARE
    assert (await authenticator.authenticate(bearer("b"), {})).principal.namespace == Namespace.of("bob")


async def test_only_an_admin_may_look_at_the_sessions_of_others(tokens):
    authenticator = Authenticator(tokens=tokens, admins=["root"], unowned_sessions_owner="alice")
    bob = (await authenticator.authenticate(bearer("b"), {})).principal
    root = (await authenticator.authenticate(bearer("r"), {})).principal

    assert authenticator.namespace_for(root, "bob") == bob.namespace
    assert authenticator.namespace_for(root, "alice") == BARE
    assert authenticator.namespace_for(root, "-", may_be_all=True) == EVERYBODY
    assert authenticator.namespace_for(bob, "") == authenticator.namespace_for(bob, "bob") == bob.namespace
    for owner in ("alice", "nobody", "-"):
        with pytest.raises(PermissionDeniedError):
            authenticator.namespace_for(bob, owner)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("example.com", False),
        ("localhost.example.com", False),
    ],
)
def test_loopback_is_what_only_this_machine_can_reach(host, expected):
    assert is_loopback(host) is expected
