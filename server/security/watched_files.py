"""Files that an operator replaces while the server runs: certificates, tokens, keys.

A file has changed when its size, its time of change or its inode has: secrets of Kubernetes come as links that are
turned to another directory, and editors write a new file in the place of the old.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from server.errors import SecurityFileError

_LOOK_PAUSE_S = 1.0
MAX_FILE_BYTES = 4 * 2**20
"""A file of secrets that is larger than this is another file, or a device that never ends."""


_PIECE_BYTES = 16 * 1024


class WatchedFiles:
    """Files that belong together. Safe to use from any thread."""

    def __init__(self, paths: Sequence[Path], look_pause_s: float = _LOOK_PAUSE_S) -> None:
        """Nothing is read yet.

        Args:
            paths: the files.
            look_pause_s: seconds between two looks for a change at least.
        """
        self._paths = tuple(paths)
        self._look_pause_s = look_pause_s
        self._looked_s = float("-inf")
        self._seen: tuple[object, ...] | None = None
        self._lock = threading.Lock()

    def read(self) -> list[bytes]:
        """What the files hold.

        Raises:
            SecurityFileError: one cannot be read.
        """
        with self._lock:
            self._looked_s = monotonic()
            self._seen = self._signature()
        return [_read(path) for path in self._paths]

    def have_changed(self) -> bool:
        """Whether it is time to read them again; says so once for each change."""
        with self._lock:
            now_s = monotonic()
            if now_s - self._looked_s < self._look_pause_s:
                return False
            self._looked_s = now_s
            signature = self._signature()
            if signature == self._seen:
                return False
            self._seen = signature
            return True

    def _signature(self) -> tuple[object, ...]:
        return tuple(_file_signature(path) for path in self._paths)


def _file_signature(path: Path) -> object:
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise SecurityFileError(str(path), "it is not a file")
        with path.open("rb") as file:
            content = b""
            # In pieces: to ask for all of it at once takes memory for the largest that is allowed.
            while len(content) <= MAX_FILE_BYTES and (piece := file.read(_PIECE_BYTES)):
                content += piece
    except OSError as error:
        raise SecurityFileError(str(path), error.strerror or str(error)) from error
    if len(content) > MAX_FILE_BYTES:
        raise SecurityFileError(str(path), f"it has more than {MAX_FILE_BYTES} bytes")
    return content
