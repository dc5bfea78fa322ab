"""JWTs: whose a signed token is, by the keys of its issuer, from a file or a URL.

Only signatures by a private key count (RSA, elliptic curves, Ed25519): with a shared secret whoever can check a token
can make one, and a public key could be taken for the secret. Keys from a URL are fetched when they are first needed,
when they are old, and for a key that is not known yet, but never more often than once in a while, whatever comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Any
from urllib.parse import urlsplit

import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from server.errors import SecurityFileError, UnauthenticatedError
from server.security.loopback import is_loopback
from server.security.watched_files import WatchedFiles

log = structlog.get_logger()

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_LEEWAY_S = 5.0
"""By how much the issuer's clock and this one may differ."""
_KEYS_OLD_AFTER_S = 300.0
_FETCH_PAUSE_S = 10.0
_FETCH_TIMEOUT_S = 5.0
_MAX_KEYS_BYTES = 2**20
_MAX_KNOWN_TOKENS = 4096
_KNOWN_FOR_S = 60.0
"""How long a token that was verified is not verified again: what a key that was taken back can be used for still."""


@dataclass(frozen=True)
class JwtIssuer:
    """Whose JWTs are believed, and what they must say."""

    issuer: str
    """The `iss` claim."""
    audience: str
    """The `aud` claim, or one of those there."""
    keys: str
    """Path of a file with a public key as PEM or a JWK set, or URL of a JWK set."""
    algorithms: Sequence[str] = ("RS256", "ES256", "EdDSA")
    """Signatures that are accepted."""
    principal_claim: str = "sub"
    """The claim that names the principal."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a JWT says."""

    name: str
    expires_s: float
    """Seconds since the epoch."""


class JwtVerifier:
    """Verifies the JWTs of one issuer; for one event loop."""

    def __init__(
        self,
        issuer: JwtIssuer,
        *,
        fetch: Callable[[str], bytes] | None = None,
        watched: WatchedFiles | None = None,
    ) -> None:
        """Read the keys, if they are in a file.

        Args:
            issuer: whose they are.
            fetch: reads a URL, in a thread; raises OSError.
            watched: the file of keys, with another pause between two looks.

        Raises:
            SecurityFileError: the file cannot be used.
        """
        self._issuer = issuer
        self._known: OrderedDict[bytes, tuple[Verified, float]] = OrderedDict()
        self._keys: list[jwt.PyJWK] = []
        self._watched: WatchedFiles | None = None
        self._fetch = fetch or _fetch
        self._fetched_s = self._tried_s = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        parts = urlsplit(issuer.keys)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise SecurityFileError(issuer.keys, "whoever is on the way could put in keys: use https")
        if parts.scheme not in ("https", "http"):
            self._watched = watched or WatchedFiles([Path(issuer.keys)])
            self._keys = self._read_file(self._watched)

    async def verify(self, token: str) -> Verified:
        """What a token says.

        Raises:
            UnauthenticatedError: it is not to be believed.
        """
        self._look_at_file()
        digest = hashlib.sha256(token.encode()).digest()
        found = self._known.get(digest)
        if found is not None and time() < found[0].expires_s and monotonic() < found[1]:
            self._known.move_to_end(digest)
            return found[0]
        verified = await self._verify(token)
        self._known[digest] = verified, monotonic() + _KNOWN_FOR_S
        self._known.move_to_end(digest)
        if len(self._known) > _MAX_KNOWN_TOKENS:
            self._known.popitem(last=False)
        return verified

    async def _verify(self, token: str) -> Verified:
        try:
            header = jwt.get_unverified_header(token)
            algorithm = str(header.get("alg"))
            if algorithm not in self._issuer.algorithms:
                raise UnauthenticatedError("its algorithm is not accepted here")
            # A key is for one algorithm, which PyJWT holds a token against.
            key = await self._find_key(header.get("kid"), algorithm)
            claims = jwt.decode(
                token,
                key=key,
                algorithms=[algorithm],
                issuer=self._issuer.issuer,
                audience=self._issuer.audience,
                leeway=_LEEWAY_S,
                options={"require": ["exp", "iss", "aud", self._issuer.principal_claim]},
            )
            expires_s = float(claims["exp"])
        except jwt.ExpiredSignatureError as error:
            raise UnauthenticatedError("it has expired: get a new one") from error
        except jwt.InvalidIssuerError as error:
            raise UnauthenticatedError("its issuer is not the one that is believed here") from error
        except jwt.InvalidAudienceError as error:
            raise UnauthenticatedError("it is for another audience") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise UnauthenticatedError("it is no JWT that is valid here") from error
        name = claims[self._issuer.principal_claim]
        if not isinstance(name, str):
            raise UnauthenticatedError(f"its claim {self._issuer.principal_claim!r} is no text")
        return Verified(name, expires_s + _LEEWAY_S)

    async def _find_key(self, key_id: object, algorithm: str) -> jwt.PyJWK:
        key = self._pick(key_id, algorithm)
        if self._watched is None:
            is_old = monotonic() - self._fetched_s > _KEYS_OLD_AFTER_S
            if key is None or is_old:
                # Whoever has a key need not wait for newer ones.
                fetching = self._begin_to_fetch()
                if key is None and fetching is not None:
                    await asyncio.shield(fetching)
                    key = self._pick(key_id, algorithm)
        if key is None:
            raise UnauthenticatedError("it is signed with a key that is not known here")
        return key

    def _pick(self, key_id: object, algorithm: str) -> jwt.PyJWK | None:
        """The key that a token names; without a name the only one there is, which may be a bare one of a file."""
        keys = [key for key in self._keys if key.algorithm_name == algorithm]
        if len(keys) == 1 and (key_id is None or keys[0].key_id is None):
            return keys[0]
        return next((key for key in keys if key.key_id is not None and key.key_id == key_id), None)

    def _begin_to_fetch(self) -> asyncio.Task[None] | None:
        if self._fetching is None and monotonic() - self._tried_s > _FETCH_PAUSE_S:
            self._tried_s = monotonic()
            self._fetching = asyncio.create_task(self._fetch_keys())
        return self._fetching

    async def _fetch_keys(self) -> None:
        url = self._issuer.keys
        try:
            content = await asyncio.to_thread(self._fetch, url)
            self._keys = _parse_key_set(url, content, self._issuer.algorithms)
            self._fetched_s = monotonic()
            self._known.clear()
        except (OSError, ValueError, SecurityFileError) as error:
            log.error("the keys of JWTs cannot be fetched; those before stay in use", problem=str(error))
        finally:
            self._fetching = None

    def _look_at_file(self) -> None:
        if self._watched is None or not self._watched.have_changed():
            return
        try:
            self._keys = self._read_file(self._watched)
        except SecurityFileError as error:
            log.error("the keys of JWTs before stay in use", problem=str(error))
        else:
            self._known.clear()
            log.info("keys of JWTs read again", num_keys=len(self._keys))

    def _read_file(self, watched: WatchedFiles) -> list[jwt.PyJWK]:
        source, algorithms = self._issuer.keys, self._issuer.algorithms
        (content,) = watched.read()
        if not content.lstrip().startswith(b"-----BEGIN"):
            return _parse_key_set(source, content, algorithms)
        try:
            key: Any = serialization.load_pem_public_key(content)
            keys = _keys_of(_to_jwk(key), algorithms)
        except (jwt.PyJWTError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SecurityFileError(source, "it holds no public key as PEM that is of use") from error
        if not keys:
            raise SecurityFileError(source, f"its key is for none of {', '.join(algorithms)}")
        return keys


def _to_jwk(key: Any) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPublicKey):
        return RSAAlgorithm.to_jwk(key, as_dict=True)
    if isinstance(key, ec.EllipticCurvePublicKey):
        return ECAlgorithm.to_jwk(key, as_dict=True)
    return OKPAlgorithm.to_jwk(key, as_dict=True)


def _parse_key_set(source: str, content: bytes, algorithms: Sequence[str]) -> list[jwt.PyJWK]:
    keys: list[jwt.PyJWK] = []
    try:
        for described in json.loads(content)["keys"]:
            with suppress(jwt.PyJWTError):  # a set may hold keys for other uses
                keys += _keys_of(described, algorithms)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SecurityFileError(source, "it holds no JWK set") from error
    if not keys:
        raise SecurityFileError(source, f"it has no key for {', '.join(algorithms)}")
    return keys


def _keys_of(described: dict[str, Any], algorithms: Sequence[str]) -> list[jwt.PyJWK]:
    """A key, for each of the algorithms that it may be used with."""
    if described.get("use", "sig") != "sig" or described.get("kty") == "oct":
        return []
    if described.get("kty") == "RSA" and "alg" not in described:
        return [jwt.PyJWK(described, name) for name in algorithms if name.startswith(("RS", "PS"))]
    key = jwt.PyJWK(described)
    return [key] if key.algorithm_name in algorithms else []


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Keys come from where the operator said, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """None: the redirect is an error."""


def _fetch(url: str) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(url, timeout=_FETCH_TIMEOUT_S) as response:
        content: bytes = response.read(_MAX_KEYS_BYTES + 1)
    if len(content) > _MAX_KEYS_BYTES:
        raise ValueError(f"{url} has more than {_MAX_KEYS_BYTES} bytes")
    return content
