import asyncio
import base64
import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from server.errors import SecurityFileError, UnauthenticatedError
from server.security.jwts import JwtIssuer, JwtVerifier
from server.security.watched_files import WatchedFiles

ISSUER, AUDIENCE = "https://issuer.example", "ntm"


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def ec_key():
    return ec.generate_private_key(ec.SECP256R1())


def public_pem(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_set(**keys):
    """A JWK set of public keys by id."""
    kinds = {
        rsa.RSAPublicKey: RSAAlgorithm,
        ec.EllipticCurvePublicKey: ECAlgorithm,
        ed25519.Ed25519PublicKey: OKPAlgorithm,
    }
    described = []
    for key_id, key in keys.items():
        kind = next(kind for of, kind in kinds.items() if isinstance(key.public_key(), of))
        described.append(kind.to_jwk(key.public_key(), as_dict=True) | {"kid": key_id})
    return json.dumps({"keys": described}).encode()


def claims(**changes):
    said = {
        "sub": "alice",
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": datetime.now(UTC) + timedelta(minutes=5),
    }
    return {name: value for name, value in (said | changes).items() if value is not None}


def signed(key, algorithm="ES256", headers=None, **changes):
    return jwt.encode(claims(**changes), key, algorithm, headers=headers)


@pytest.fixture
def verifier(tmp_path, ec_key):
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(ec_key))
    return JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, str(path)))


async def test_a_token_of_the_issuer_names_the_principal(verifier, ec_key):
    verified = await verifier.verify(signed(ec_key))

    assert verified.name == "alice"
    assert verified.expires_s > datetime.now(UTC).timestamp()


async def test_a_token_for_several_audiences_is_accepted(verifier, ec_key):
    assert (await verifier.verify(signed(ec_key, aud=["other", AUDIENCE]))).name == "alice"


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other.example"},
        {"iss": None},
        {"aud": "other"},
        {"aud": None},
        {"exp": datetime.now(UTC) - timedelta(hours=1)},
        {"exp": None},
        {"sub": None},
        {"nbf": datetime.now(UTC) + timedelta(hours=5)},
        {"exp": 10**400},
    ],
)
async def test_a_token_that_says_the_wrong_thing_is_refused(verifier, ec_key, changes):
    with pytest.raises(UnauthenticatedError):
        await verifier.verify(signed(ec_key, **changes))


async def test_a_token_without_a_signature_is_refused(verifier):
    with pytest.raises(UnauthenticatedError):
        await verifier.verify(jwt.encode(claims(), None, "none"))


async def test_a_token_signed_with_another_key_is_refused(verifier):
    with pytest.raises(UnauthenticatedError):
        await verifier.verify(signed(ec.generate_private_key(ec.SECP256R1())))


async def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(verifier, ec_key):
    # PyJWT refuses to make one, so it is put together by hand.
    import base64
    import hashlib
    import hmac

    def part(content):
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    said = {**claims(), "exp": 2**33}
    head = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode()) + b"." + part(json.dumps(said).encode())
    forged = head + b"." + part(hmac.digest(public_pem(ec_key), head, hashlib.sha256))

    with pytest.raises(UnauthenticatedError):
        await verifier.verify(forged.decode())


async def test_a_token_of_another_algorithm_than_the_listed_is_refused(tmp_path, rsa_key):
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(rsa_key))
    verifier = JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, str(path), ["RS256"]))

    assert (await verifier.verify(signed(rsa_key, "RS256"))).name == "alice"
    with pytest.raises(UnauthenticatedError):
        await verifier.verify(signed(rsa_key, "RS512"))


@pytest.mark.parametrize("token", ["", "a", "a.b.c", "....", "\x00", "é.é.é", "a" * 16384])
async def test_what_is_no_token_is_refused(verifier, token):
    with pytest.raises(UnauthenticatedError):
        await verifier.verify(token)


async def test_a_token_is_refused_once_it_has_expired_though_it_was_verified_before(
    verifier, ec_key, monkeypatch
):
    token = signed(ec_key)
    verified = await verifier.verify(token)
    monkeypatch.setattr("server.security.jwts.time", lambda: verified.expires_s + 1)
    monkeypatch.setattr("jwt.api_jwt.datetime", _Later)

    with pytest.raises(UnauthenticatedError, match="expired"):
        await verifier.verify(token)


class _Later(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(minutes=10)


async def test_keys_in_a_file_are_read_again_when_they_change(tmp_path, ec_key):
    path = tmp_path / "keys.json"
    path.write_bytes(key_set(old=ec_key))
    verifier = JwtVerifier(
        JwtIssuer(ISSUER, AUDIENCE, str(path)), watched=WatchedFiles([path], look_pause_s=0.0)
    )
    old = signed(ec_key, headers={"kid": "old"})
    assert (await verifier.verify(old)).name == "alice"
    new_key = ed25519.Ed25519PrivateKey.generate()

    path.write_bytes(key_set(new=new_key))

    with pytest.raises(UnauthenticatedError, match="key"):
        await verifier.verify(old)
    assert (await verifier.verify(signed(new_key, "EdDSA", headers={"kid": "new"}))).name == "alice"


async def test_a_key_of_a_set_is_found_by_its_id(tmp_path, ec_key, rsa_key):
    path = tmp_path / "keys.json"
    path.write_bytes(key_set(one=ec_key, two=rsa_key))
    verifier = JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, str(path)))

    assert (await verifier.verify(signed(rsa_key, "RS256", headers={"kid": "two"}))).name == "alice"
    with pytest.raises(UnauthenticatedError, match="key"):
        await verifier.verify(signed(rsa_key, "RS256", headers={"kid": "one"}))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"keys": []}', b'{"keys": [1]}', b"[", b"-----BEGIN X"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    path = tmp_path / "keys"
    path.write_bytes(content)

    with pytest.raises(SecurityFileError):
        JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, str(path)))


def test_a_shared_secret_is_no_key(tmp_path):
    path = tmp_path / "keys"
    path.write_text(json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a", "alg": "HS256"}]}))

    with pytest.raises(SecurityFileError):
        JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, str(path)))


def test_a_url_that_others_could_answer_is_refused():
    with pytest.raises(SecurityFileError, match="https"):
        JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, "http://issuer.example/keys"))


class Fetcher:
    """Answers with a key set, and counts."""

    def __init__(self, content):
        self.content = content
        self.num_fetches = 0

    def __call__(self, url):
        self.num_fetches += 1
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


async def test_keys_of_a_url_are_fetched_once_for_many_tokens(ec_key):
    fetcher = Fetcher(key_set(k=ec_key))
    verifier = JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, "https://issuer.example/keys"), fetch=fetcher)
    tokens = [signed(ec_key, headers={"kid": "k"}, jti=str(number)) for number in range(20)]

    await asyncio.gather(*map(verifier.verify, tokens))

    assert fetcher.num_fetches == 1


async def test_a_flood_of_unknown_key_ids_does_not_become_a_flood_of_fetches(ec_key):
    fetcher = Fetcher(key_set(k=ec_key))
    verifier = JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, "https://issuer.example/keys"), fetch=fetcher)

    for number in range(50):
        with pytest.raises(UnauthenticatedError):
            await verifier.verify(signed(ec_key, headers={"kid": str(number)}))

    assert fetcher.num_fetches == 1


async def test_a_new_key_of_the_issuer_is_fetched_when_a_token_names_it(ec_key, monkeypatch):
    fetcher = Fetcher(key_set(k=ec_key))
    verifier = JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, "https://issuer.example/keys"), fetch=fetcher)
    await verifier.verify(signed(ec_key, headers={"kid": "k"}))
    new_key = ec.generate_private_key(ec.SECP256R1())
    fetcher.content = key_set(new=new_key)
    monkeypatch.setattr("server.security.jwts._FETCH_PAUSE_S", 0.0)

    assert (await verifier.verify(signed(new_key, headers={"kid": "new"}))).name == "alice"


async def test_an_issuer_that_cannot_be_reached_makes_callers_unknown_and_not_the_server_fail():
    fetcher = Fetcher(OSError("no route"))
    verifier = JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, "https://issuer.example/keys"), fetch=fetcher)

    with pytest.raises(UnauthenticatedError):
        await verifier.verify(signed(ec.generate_private_key(ec.SECP256R1()), headers={"kid": "k"}))


async def test_keys_are_fetched_by_http_and_a_redirect_is_not_followed(ec_key):
    class Keys(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/keys" else 302)
            if self.path != "/keys":
                self.send_header("Location", "/keys")
            self.end_headers()
            self.wfile.write(key_set(k=ec_key) if self.path == "/keys" else b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Keys)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        token = signed(ec_key, headers={"kid": "k"})

        assert (await JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, f"{url}/keys")).verify(token)).name == "alice"
        with pytest.raises(UnauthenticatedError):
            await JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, f"{url}/elsewhere")).verify(token)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("key_type", ["1.3.0.0", "1.2.840.10045.2.1"])
def test_a_key_of_a_kind_or_a_curve_that_is_unknown_is_refused(tmp_path, key_type):
    """An object identifier in the key's bytes is another."""
    of_ed25519, of_p256 = bytes.fromhex("06032b6570"), bytes.fromhex("06082a8648ce3d030107")
    if key_type == "1.3.0.0":
        content, old, new = (
            public_pem(ed25519.Ed25519PrivateKey.generate()),
            of_ed25519,
            b"\x06\x03\x2b\x00\x00",
        )
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        content, old, new = public_pem(key), of_p256, of_p256[:-1] + b"\x63"
    der = base64.b64decode(b"".join(content.split(b"\n")[1:-2]))
    assert old in der
    path = tmp_path / "key.pem"
    pem = base64.encodebytes(der.replace(old, new))
    path.write_bytes(b"-----BEGIN PUBLIC KEY-----\n" + pem + b"-----END PUBLIC KEY-----\n")

    with pytest.raises(SecurityFileError, match="no public key as PEM that is of use"):
        JwtVerifier(JwtIssuer(ISSUER, AUDIENCE, str(path)))
