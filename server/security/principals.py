"""Principals: who calls. By a JWT or a token, where the server has any; else by the client's certificate.

Where tokens or JWTs are set up, a call must carry one, and a certificate only opens the connection: a router has a
certificate of its own, and would else lend its name to all who come through it. Where nothing is set up, everybody is
one anonymous principal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import time

from cryptography import x509
from cryptography.x509.oid import NameOID

from server.errors import PermissionDeniedError, UnauthenticatedError
from server.security.credentials import CERTIFICATE_ERRORS
from server.security.jwts import JwtVerifier
from server.security.namespaces import BARE, EVERYBODY, Namespace, split_key
from server.security.tokens import TokenFile

AUTHORIZATION_KEY = "authorization"
EVERY_OWNER = "-"
"""What an admin gives as the owner to list the sessions of all."""
_SCHEME = "bearer "
_MAX_TOKEN_CHARACTERS = 16 * 1024
_MAX_NAME_CHARACTERS = 128
_MAX_CERTIFICATES = 1024

Metadata = Iterable[tuple[str, str | bytes]]
AuthContext = Mapping[str, Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody whom sessions can belong to."""

    name: str
    """"" for everybody, where nobody is told apart."""
    namespace: Namespace
    is_admin: bool = False


ANONYMOUS = Principal("", BARE)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, until when that holds."""

    principal: Principal
    expires_s: float = float("inf")
    """Seconds since the epoch: a stream does not outlive it."""


ANONYMOUS_CALLER = Caller(ANONYMOUS)
_current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS_CALLER)


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Around what is done for a caller."""
    before = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(before)


def current_principal() -> Principal:
    """Who makes the call that runs in this task."""
    return _current.get().principal


class Authenticator:
    """Says who a caller is; for one event loop."""

    def __init__(
        self,
        *,
        tokens: TokenFile | None = None,
        jwts: JwtVerifier | None = None,
        certificates: bool = False,
        admins: Iterable[str] = (),
        unowned_sessions_owner: str = "",
    ) -> None:
        """With nothing, everybody is anonymous.

        Args:
            tokens: names by bearer token.
            jwts: names by JWT.
            certificates: whether clients show certificates, which the transport has verified.
            admins: names that may list, read and delete the sessions of others.
            unowned_sessions_owner: the name that sessions without an owner belong to.
        """
        self._tokens = tokens
        self._jwts = jwts
        self._certificates = certificates
        self._admins = frozenset(admins)
        self._unowned_sessions_owner = unowned_sessions_owner
        self._certificate_names: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self.tells_apart: bool = certificates or tokens is not None or jwts is not None
        self.needs_token: bool = tokens is not None or jwts is not None
        """Whether a call without a token is refused, whatever its certificate."""

    async def authenticate(self, metadata: Metadata, auth_context: AuthContext) -> Caller:
        """Who makes a call.

        Args:
            metadata: what came with the call.
            auth_context: what the transport knows of the connection.

        Raises:
            UnauthenticatedError: nobody who is known here.
        """
        if not self.tells_apart:
            return ANONYMOUS_CALLER
        if not self.needs_token:
            return self._by_certificate(auth_context)
        token = bearer_token(metadata)
        if self._tokens is not None and (name := self._tokens.name_of(token)) is not None:
            return Caller(self.principal(name))
        if self._jwts is None:
            raise UnauthenticatedError("the token is not known here")
        verified = await self._jwts.verify(token)
        return Caller(self.principal(verified.name), verified.expires_s)

    def principal(self, name: str) -> Principal:
        """The principal of a name.

        Raises:
            UnauthenticatedError: nobody can have this name.
        """
        if not name or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable() or name == EVERY_OWNER:
            raise UnauthenticatedError(
                f"a principal's name has 1 to {_MAX_NAME_CHARACTERS} printable characters, and is not {EVERY_OWNER!r}"
            )
        return Principal(name, self._namespace(name), name in self._admins)

    def namespace_for(self, principal: Principal, owner: str, *, may_be_all: bool = False) -> Namespace:
        """Where a principal looks that names an owner, who may be another one for an admin; "" for itself.

        Raises:
            PermissionDeniedError: it may not look there.
        """
        if owner in ("", principal.name):
            return principal.namespace
        if not principal.is_admin:
            raise PermissionDeniedError("only an admin may name another owner")
        if owner == EVERY_OWNER:
            if not may_be_all:
                raise PermissionDeniedError("name the one whose session it is")
            return EVERYBODY
        return self._namespace(owner)

    def owner_of(self, key: str) -> str:
        """The name of the principal that a session belongs to; "" if it is nobody's."""
        return split_key(key)[0] or (self._unowned_sessions_owner if self.tells_apart else "")

    def _namespace(self, name: str) -> Namespace:
        return BARE if name == self._unowned_sessions_owner else Namespace.of(name)

    def _by_certificate(self, auth_context: AuthContext) -> Caller:
        pem = next(iter(auth_context.get("x509_pem_cert", ())), b"")
        known = self._certificate_names.get(pem)
        if known is None:
            known = _name_and_end(pem)
            self._certificate_names[pem] = known
            if len(self._certificate_names) > _MAX_CERTIFICATES:
                self._certificate_names.popitem(last=False)
        name, expires_s = known
        # The connection may have been made while it was valid.
        if time() >= expires_s:
            raise UnauthenticatedError("the certificate has ended: connect with a new one")
        return Caller(self.principal(name), expires_s)


def bearer_token(metadata: Metadata) -> str:
    """The token that a call carries.

    Raises:
        UnauthenticatedError: it carries none.
    """
    values = [value for key, value in metadata if key == AUTHORIZATION_KEY]
    if len(values) != 1:
        raise UnauthenticatedError('send one token, as metadata "authorization: Bearer TOKEN"')
    (value,) = values
    if not isinstance(value, str) or value[: len(_SCHEME)].lower() != _SCHEME:
        raise UnauthenticatedError('send the token as metadata "authorization: Bearer TOKEN"')
    token = value[len(_SCHEME) :].strip()
    if not token or len(token) > _MAX_TOKEN_CHARACTERS:
        raise UnauthenticatedError(f"a token has 1 to {_MAX_TOKEN_CHARACTERS} characters")
    return token


def _name_and_end(pem: bytes) -> tuple[str, float]:
    """The common name of a certificate, or the first of its other names, and when it ends."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        common_names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        names = [str(attribute.value) for attribute in common_names if attribute.value]
        if not names:
            others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = [str(name.value) for name in others]
    except CERTIFICATE_ERRORS:
        names = []
    if not names:
        raise UnauthenticatedError("connect with a certificate that has a name")
    return names[0], certificate.not_valid_after_utc.timestamp()
