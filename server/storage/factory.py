"""Opening the store that a URL names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from server.errors import StoreSettingsError
from server.storage.interface import Store
from server.storage.memory import MemoryStore
from server.storage.sqlite import SqliteStore


def without_secrets(url: str) -> str:
    """A store's URL as it may be shown: without what stands before the @, and without its options."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.partition("?")[0].rpartition("@")[2]


def open_store(
    url: str,
    *,
    sync: Literal["full", "normal"] = "full",
    lease_s: float = 3.0,
    timeout_s: float = 2.0,
    max_bytes: int | None = None,
) -> Store:
    """Open a store.

    Args:
        url: "none"; "sqlite:///RELATIVE/FILE" or "sqlite:////ABSOLUTE/FILE"; "redis://HOST:PORT/DB" for Valkey and
            Redis, "rediss://" over TLS.
        sync: "full" to survive a power failure, or nothing is opened; "normal" to survive the server's death.
        lease_s: how long a replica's sessions stay its own after its last beat, in a store that replicas share.
        timeout_s: how long an answer of a Valkey server may take.
        max_bytes: the most that a SQLite file may take.

    Raises:
        StoreSettingsError: the store cannot be used as asked.
        StoreUnavailableError: the Valkey server does not answer.
    """
    if url == "none":
        return MemoryStore()
    if url.startswith("sqlite:///") and (path := unquote(url.removeprefix("sqlite:///"))):
        return SqliteStore(Path(path), sync, max_bytes)
    if url.startswith(("redis://", "rediss://")):
        # Here, as its client takes a while to import and only its users need it.
        from server.storage.redis import RedisStore

        return RedisStore(url, lease_s, sync, timeout_s)
    # Without the rest of it, which can hold a password.
    raise StoreSettingsError(
        f"--store {url.partition(':')[0]!r} names no store: give none, sqlite:///DIRECTORY/FILE (four slashes for an "
        "absolute path) or redis://HOST:PORT/DB"
    )
