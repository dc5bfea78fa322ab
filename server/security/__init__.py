"""Security: who calls, what is theirs, and how much of it they may have. Free of gRPC's calls and of sessions.

`credentials.py` keeps the server's certificates, `principals.py` says who a caller is by certificate, token or JWT,
`namespaces.py` gives each principal session ids of its own, and `quotas.py` bounds what one principal takes.
"""

from server.security.credentials import TlsFiles, TlsIdentity
from server.security.jwts import ALGORITHMS as JWT_ALGORITHMS
from server.security.jwts import JwtIssuer, JwtVerifier
from server.security.loopback import is_loopback
from server.security.namespaces import Namespace, split_key
from server.security.principals import (
    ANONYMOUS,
    Authenticator,
    Caller,
    Principal,
    calling,
    current_principal,
)
from server.security.quotas import QuotaEnforcer, Quotas, Usage
from server.security.tokens import TokenFile

__all__ = [
    "ANONYMOUS",
    "JWT_ALGORITHMS",
    "Authenticator",
    "Caller",
    "JwtIssuer",
    "JwtVerifier",
    "Namespace",
    "Principal",
    "QuotaEnforcer",
    "Quotas",
    "TlsFiles",
    "TlsIdentity",
    "TokenFile",
    "Usage",
    "calling",
    "current_principal",
    "is_loopback",
    "split_key",
]
