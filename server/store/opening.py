"""Opening the store that a URL names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from server.errors import StoreSettingsError
from server.store import Store
from server.store.none import NoStore
from server.store.sqlite import SqliteStore


def open_store(
    url: str,
    *,
    sync: Literal["full", "normal"] = "full",
    lease_s: float = 3.0,
    timeout_s: float = 5.0,
    max_bytes: int | None = None,
) -> Store:
    """Open a store.

    Args:
        url: "none", "sqlite:///RELATIVE/FILE" or "sqlite:////ABSOLUTE/FILE".
        sync: "full" to survive a power failure, or nothing is opened; "normal" to survive the server's death.
        max_bytes: the most that a SQLite file may take.

    Raises:
        StoreSettingsError: the store cannot be used as asked.
    """
    if url == "none":
        return NoStore()
    if url.startswith("sqlite:///") and (path := unquote(urlsplit(url).path[1:])):
        return SqliteStore(Path(path), sync, max_bytes)
    raise StoreSettingsError(
        f"{url!r} names no store: give none, sqlite:///RELATIVE/FILE or sqlite:////ABSOLUTE/FILE"
    )
