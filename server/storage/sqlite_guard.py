"""Beside a SQLite store: the locks that keep other servers away, and a count that shows what its log has lost.

SQLite takes a log whose end is cut, flipped or gone for one that ends there, and says nothing. So each transaction
counts itself in the database (`sqlite.py`), and once it is committed here as well, outside of the log. A server that
finds fewer in the database than here has lost what was answered. The count needs no fsync: after a power failure it
may be behind, which accuses nobody, and where it is ahead it knows that the machine has begun anew.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from server.errors import StoreSettingsError, StoreUnavailableError
from server.storage.interface import Durability

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_COUNT = re.compile(rb"ntm\.commits (process|power) (\S+) (\d{20})\n")


@dataclass(frozen=True, slots=True)
class CommitCount:
    """What a server that did not close its store had committed."""

    num_commits: int
    durability: Durability
    """What these commits were to survive."""
    is_of_this_boot: bool
    """Whether the machine has not been started since; unknown is no."""

    @property
    def may_have_lost_some(self) -> bool:
        """Whether a power failure may have taken the last of them, as was agreed."""
        return self.durability == Durability.PROCESS and not self.is_of_this_boot


class SqliteGuard:
    """The lock on a database's file by whatever name, and on the file beside it that has the count."""

    def __init__(self, path: Path) -> None:
        """Lock both, and make them where they are not there.

        Args:
            path: of the database file, links resolved.

        Raises:
            StoreSettingsError: another server has the file, it has several names, or it cannot be used.
        """
        self.count_path = path.with_name(path.name + ".lock")
        self._boot_id = _boot_id()
        self._head = b""
        with ExitStack() as on_failure:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._count_file = _open(self.count_path)
            except OSError as error:
                raise StoreSettingsError(
                    f"the session store cannot write to {path.parent} ({error.strerror}): let the server's user write "
                    "there, or choose another directory with --store sqlite:///DIRECTORY/FILE"
                ) from error
            on_failure.callback(os.close, self._count_file)
            # First the one that SQLite does not open: closing a file gives up all locks on it that a process has.
            _lock(self._count_file, path)
            try:
                self._database = _open(path)
            except OSError as error:
                raise StoreSettingsError(
                    f"{path} cannot be used as a session store ({error.strerror}): give --store the path of a file in "
                    "a directory that this server may write to"
                ) from error
            on_failure.callback(os.close, self._database)
            _lock(self._database, path)
            status = os.fstat(self._database)
            if status.st_nlink > 1:
                raise StoreSettingsError(
                    f"{path} has {status.st_nlink} names (hard links), and SQLite keeps its log by one of them: remove "
                    f"the others, which `find DIRECTORY -samefile {path}` finds"
                )
            if status.st_mode & 0o077:
                with suppress(PermissionError):  # another's file that this server may use
                    os.fchmod(self._database, 0o600)
            on_failure.pop_all()

    def count(self) -> CommitCount | None:
        """What a server before this one has left; None: it closed its store, or the count is gone."""
        match = _COUNT.fullmatch(os.pread(self._count_file, 4096, 0))
        if match is None:
            return None
        durability, boot_id, num_commits = match.groups()
        is_of_this_boot = self._boot_id != b"-" and boot_id == self._boot_id
        return CommitCount(int(num_commits), Durability(durability.decode()), is_of_this_boot)

    def begin(self, durability: Durability) -> None:
        """Say what the commits that are noted from here on survive."""
        self._head = b"ntm.commits %s %s " % (durability.value.encode(), self._boot_id)

    def note(self, num_commits: int) -> None:
        """Say how many transactions are committed.

        Raises:
            StoreUnavailableError: it cannot be written.
        """
        try:
            os.pwrite(self._count_file, b"%s%020d\n" % (self._head, num_commits), 0)
        except OSError as error:
            raise StoreUnavailableError(error) from error

    def close(self, is_whole: bool) -> None:
        """Let other servers in; once SQLite has closed the file.

        Args:
            is_whole: there is no log any more that could lose anything.
        """
        if is_whole:
            with suppress(OSError):  # then the next server compares
                os.ftruncate(self._count_file, 0)
        os.close(self._database)
        os.close(self._count_file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreSettingsError(
            f"another server keeps its sessions in {path.parent} ({path.name}): stop it, give this one a "
            "directory of its own, or let both share a Valkey server with --store redis://HOST:PORT/DB"
        ) from error


def _boot_id() -> bytes:
    try:
        return _BOOT_ID.read_bytes().strip() or b"-"
    except OSError:
        return b"-"
