"""Tokens: who a bearer token belongs to, from a file that holds hashes and no tokens.

Each line of the file is `NAME sha256:HEX`; `#` begins a comment. `python -m server.security.tokens NAME` makes a token
and its line. A token has 256 random bits, so a plain SHA-256 of it cannot be undone, and needs no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from pathlib import Path

import structlog

from server.errors import SecurityFileError
from server.security.watched_files import WatchedFiles

log = structlog.get_logger()

_TOKEN_BYTES = 32
_LINE = re.compile(r"(?P<name>\S+)\s+sha256:(?P<digest>[0-9a-f]{64})")
_MAX_NAME_CHARACTERS = 128


class TokenFile:
    """The names and the hashes of their tokens, as the file has them now."""

    def __init__(self, path: Path, watched: WatchedFiles | None = None) -> None:
        """Read the file.

        Args:
            path: of the file.
            watched: the same file, with another pause between two looks.

        Raises:
            SecurityFileError: it cannot be used.
        """
        self._path = path
        self._watched = watched or WatchedFiles([path])
        self._names = self._read()

    def name_of(self, token: str) -> str | None:
        """Whose token this is, or None.

        How long it takes depends on the token's hash and tells nothing of any token.
        """
        self._look()
        digest = hashlib.sha256(token.encode()).digest()
        for known, name in self._names.get(digest[:2], ()):
            if hmac.compare_digest(known, digest):
                return name
        return None

    def _look(self) -> None:
        if not self._watched.have_changed():
            return
        try:
            self._names = self._read()
        except SecurityFileError as error:
            log.error("the tokens before stay in use", problem=str(error))
        else:
            log.info("tokens read again", num_tokens=sum(map(len, self._names.values())))

    def _read(self) -> dict[bytes, list[tuple[bytes, str]]]:
        (content,) = self._watched.read()
        try:
            lines = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise SecurityFileError(str(self._path), "it is not text in UTF-8") from error
        names: dict[bytes, list[tuple[bytes, str]]] = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            match = _LINE.fullmatch(text)
            if match is None or len(match["name"]) > _MAX_NAME_CHARACTERS:
                # Without the line: somebody may have written a token where its hash belongs.
                raise SecurityFileError(
                    str(self._path),
                    f"line {number} is not NAME sha256:HEX, as `python -m server.security.tokens` makes",
                )
            digest = bytes.fromhex(match["digest"])
            names.setdefault(digest[:2], []).append((digest, match["name"]))
        return names


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def line_of(name: str, token: str) -> str:
    """The line of a token file for a token."""
    return f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def main() -> int:
    """Make a token for a name; prints the token and its line."""
    if len(sys.argv) != 2 or not _LINE.fullmatch(line_of(sys.argv[1], "")):
        print("python -m server.security.tokens NAME, a name without spaces", file=sys.stderr)
        return 2
    token = new_token()
    print(f"token, for {sys.argv[1]} alone:   {token}")
    print(f"line, for the server's --tokens: {line_of(sys.argv[1], token)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
