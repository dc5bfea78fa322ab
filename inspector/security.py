"""The guard before every route: who may ask, from where, and what a browser may do with the answers.

The page has no cookies, so a browser sends nothing by itself that lets somebody in. What is left to keep out is another
page in the same browser: one that posts to us (its `Origin` is not ours), reads from us (`Sec-Fetch-Site`), or has its
own name lead to our address (`Host` is not ours). The content security policy runs the page's own files alone, and
turns off every way from text to markup.
"""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_SAFE_METHODS = {"GET", "HEAD"}


class Guard:
    """ASGI middleware that refuses what the page itself would not send."""

    def __init__(self, app: ASGIApp, *, token: str | None, host: str, is_loopback: bool) -> None:
        """Guard an application.

        Args:
            app: what to guard.
            token: the secret that requests to /api must carry as a bearer token; None asks for none.
            host: the host that is listened on.
            is_loopback: whether that is this machine alone; then its name must be one of this machine's.
        """
        self._app = app
        self._token_digest = None if token is None else hashlib.sha256(token.encode()).digest()
        self._names = _LOOPBACK_NAMES | {host} if is_loopback else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, and hand on all others."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith("/api/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if self._names is not None and _hostname(host) not in self._names:
            return _refused(
                403, "this address is not one of the inspector's: open it by the address it printed"
            )
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and path != "/":
            return _refused(403, "requests of other pages are refused")
        if method not in _SAFE_METHODS and _netloc(headers.get("origin", "")) != host:
            return _refused(403, "requests that act need an Origin header with the inspector's own address")
        if self._token_digest is not None and path.startswith("/api/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(given.strip().encode()).digest()
            if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._token_digest):
                response = _refused(401, "this inspector asks for its token")
                response.headers["WWW-Authenticate"] = "Bearer"
                return response
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _refused(status: int, problem: str) -> JSONResponse:
    return JSONResponse({"error": problem}, status)
