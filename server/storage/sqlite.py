"""One server's sessions in a SQLite file: the store for whoever has one server and a disk.

The file is locked for as long as it is open (`sqlite_guard.py`), so there is one replica, and who owns a session under
which fence need not be on disk: it is kept in memory, where every claim and release is free. One connection writes,
under a lock; another reads beside it, which the write-ahead log allows. Each transaction counts itself, so that a log
that has lost its end is noticed at the next start.
"""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import structlog

from server.errors import (
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreSettingsError,
    StoreUnavailableError,
)
from server.storage.interface import (
    FIRST_FENCE,
    NEW,
    Beat,
    Claim,
    Durability,
    Entry,
    EntryExists,
    Fenced,
    OwnedElsewhere,
    Record,
    Refusal,
    RequestExists,
    Write,
    new_replica_id,
)
from server.storage.sqlite_guard import CommitCount, SqliteGuard

log = structlog.get_logger()

_APPLICATION_ID = 0x4E544D53
"""Says in the file's header that it is ours ("NTMS")."""

_PAGE_BYTES = 8192
_CHECKPOINT_PAGES = 2000
_CACHE_KIB = 32 * 1024
"""Chosen by measurement, for commits of 64 records of 2.2 KB beside 20,000 sessions. Records in the order they come,
with an index by session, take half the time of records kept in the order of session (3.5 ms against 7.5 on a busy
machine): the log gets whole pages of new content instead of a few rows of many pages. Pages of 8 KB waste less than of
4 KB, and a checkpoint every 16 MB instead of 4 MB halves the mean, as a page changed often is written back once. It
takes some 25 ms of one commit in 70; the mean with it, snapshots and forgotten records is 2.7 ms, without fsyncs."""

_SCHEMA_STEPS = (
    """
    CREATE TABLE session (
        key INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        model_name TEXT NOT NULL,
        request_id TEXT NOT NULL,
        next_step INTEGER NOT NULL,
        last_use_s REAL NOT NULL,
        content BLOB NOT NULL,
        end_time_s REAL
    );
    CREATE UNIQUE INDEX session_by_request ON session (request_id) WHERE request_id != '';
    CREATE INDEX living_by_id ON session (id, model_name) WHERE end_time_s IS NULL;
    CREATE INDEX living_by_use ON session (last_use_s) WHERE end_time_s IS NULL;
    CREATE INDEX ended_by_time ON session (end_time_s) WHERE end_time_s IS NOT NULL;
    CREATE TABLE snapshot (session_key INTEGER PRIMARY KEY, content BLOB NOT NULL);
    CREATE TABLE record (session_key INTEGER NOT NULL, first_step INTEGER NOT NULL, content BLOB NOT NULL);
    CREATE UNIQUE INDEX record_by_step ON record (session_key, first_step);
    CREATE TABLE service (time_s REAL NOT NULL);
    INSERT INTO service VALUES (0);
    """,
    """
    ALTER TABLE service ADD COLUMN num_commits INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE service ADD COLUMN is_open INTEGER NOT NULL DEFAULT 0;
    """,
)
"""The step at index v brings a file from schema version v (its `user_version`) to v + 1."""

_ENTRY = "SELECT id, model_name, request_id, next_step, last_use_s, content, end_time_s FROM session"
_LONGEST_BEAT_GAP_S = 10.0
"""A longer time between two beats counts as this much: the machine slept."""
_SAVE_WITH_COMMIT_AFTER_S = 1.0
_SAVE_ALONE_AFTER_S = 60.0
"""How old the service time on disk gets before a commit takes it along, and before a beat writes it by itself: so an
idle server writes once a minute, and a crash takes back no more than that."""
_BUSY_TIMEOUT_S = 1.0
"""Other programs may read the file, to back it up or to look into it, and hold a lock for a moment."""
_FORGOTTEN_AT_ONCE = 1000
"""Ended sessions that one transaction forgets: some 10 ms."""
_MOST_FORGETTINGS = 4
"""Tries of one commit to make room by forgetting sessions that have ended."""
_SPARE_PAGES = 16
"""What ending sessions may take in a full store, as their index entries come before the room that they make."""


@dataclass(frozen=True, slots=True)
class _Owned:
    key: int
    fence: int


class SqliteStore:
    """Sessions in one file."""

    kind: str = "sqlite"
    keeps_steps: bool = True
    is_shared: bool = False

    def __init__(self, path: Path, sync: Literal["full", "normal"], max_bytes: int | None = None) -> None:
        """Open a file, or make it and its directory.

        Args:
            path: of the database file.
            sync: "full" to survive a power failure, "normal" to survive the server's death.
            max_bytes: the most that the database file may take; the log beside it adds some 16 MB.

        Raises:
            StoreSettingsError: another server has the file, it has lost what was answered, or it cannot be used.
        """
        self._path = path.resolve()  # the log is beside the file itself, not beside a link to it
        with ExitStack() as on_failure:
            self._guard = SqliteGuard(self._path)
            on_failure.callback(self._guard.close, is_whole=False)
            try:
                _check_whole(self._path, self._guard.count(), self._guard.count_path)
                self._writer = self._connect()
                on_failure.callback(self._writer.close)
                _check_ours(self._writer, self._path)
                self.durability: Durability = self._set_up(sync)
                _migrate(self._writer)
                self._max_pages = max_bytes and max(1, max_bytes // self._pragma("page_size"))
                self._limit_pages(spare=0)
                self._reader = self._connect()
                on_failure.callback(self._reader.close)
                saved_s, self._num_commits = self._reader.execute(
                    "SELECT time_s, num_commits FROM service"
                ).fetchone()
                self._guard.begin(self.durability)
                with self._transaction() as writer:
                    writer.execute("UPDATE service SET is_open = 1")
                # Into the file itself, where it is seen when the log is gone.
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except (sqlite3.Error, StoreCorruptError) as error:
                what_to_do = (
                    "restore it from a backup, or move it away to begin with no sessions"
                    if isinstance(_translation(error, self._path), StoreCorruptError)
                    else "give --store the path of a file in a directory that this server may write to"
                )
                raise StoreSettingsError(
                    f"{self._path} cannot be used as a session store ({error}): {what_to_do}"
                ) from error
            on_failure.pop_all()
        self.replica_id: str = new_replica_id()
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._owned: dict[str, _Owned] = {}
        self._last_fence = FIRST_FENCE
        self._service_time_s = self._saved_time_s = float(saved_s)
        self._last_beat_s = time.monotonic()
        self._closed = threading.Event()

    def commit(self, writes: Sequence[Write]) -> list[Refusal | StoreError | None]:
        """See Store.commit: one transaction."""
        with self._write_lock:
            try:
                return self._commit(writes)
            except StoreFullError as full:
                return self._commit_when_full(writes, full)
            except (OverflowError, UnicodeEncodeError, sqlite3.DataError) as error:
                # One that cannot be written must not take the others with it.
                if len(writes) == 1:
                    return [StoreUnavailableError(f"it cannot be written: {error}")]
                return [self._commit_alone(write) for write in writes]

    def _commit_when_full(
        self, writes: Sequence[Write], full: StoreFullError
    ) -> list[Refusal | StoreError | None]:
        """What makes room must not fail with what needs it; and those that have ended make room for those that live."""
        ends = [write for write in writes if _ends(write)]
        others = [write for write in writes if not _ends(write)]
        with self._spare_pages():
            ended = iter(self._commit(ends))
        outcomes: Sequence[Refusal | StoreError | None] = [full] * len(others)
        for _ in range(_MOST_FORGETTINGS if others else 0):
            with self._spare_pages():
                num_forgotten = self._forget_ended(float("inf"))
            if not num_forgotten:
                break
            try:
                outcomes = self._commit(others)
                break
            except StoreFullError:
                continue
        rest = iter(outcomes)
        return [next(ended) if _ends(write) else next(rest) for write in writes]

    def _forget_ended(self, before_s: float) -> int:
        """Forget some of the sessions that ended before a time, the oldest first; returns how many."""
        with self._transaction() as writer:
            return writer.execute(
                "DELETE FROM session WHERE key IN (SELECT key FROM session "
                "WHERE end_time_s IS NOT NULL AND end_time_s < ? ORDER BY end_time_s LIMIT ?)",
                (before_s, _FORGOTTEN_AT_ONCE),
            ).rowcount

    @contextmanager
    def _spare_pages(self) -> Iterator[None]:
        self._limit_pages(spare=_SPARE_PAGES)
        try:
            yield
        finally:
            self._limit_pages(spare=0)

    def _commit_alone(self, write: Write) -> Refusal | StoreError | None:
        try:
            return self._commit([write])[0]
        except StoreError as error:
            return error
        except (OverflowError, UnicodeEncodeError, sqlite3.DataError) as error:
            return StoreUnavailableError(f"it cannot be written: {error}")

    def _commit(self, writes: Sequence[Write]) -> list[Refusal | StoreError | None]:
        owned: dict[str, _Owned | None] = {}  # what changes in self._owned once the transaction is on disk
        with self._transaction():
            results = self._apply(writes, owned)
            if saves_time := self._service_time_s - self._saved_time_s >= _SAVE_WITH_COMMIT_AFTER_S:
                self._save_service_time()
        if saves_time:
            self._saved_time_s = self._service_time_s
        for session_id, ownership in owned.items():
            if ownership is None:
                self._owned.pop(session_id, None)
            else:
                self._owned[session_id] = ownership
        return results

    def _apply(
        self, writes: Sequence[Write], owned: dict[str, _Owned | None]
    ) -> list[Refusal | StoreError | None]:
        results: list[Refusal | StoreError | None] = []
        counters: list[tuple[int, float, int]] = []
        records: list[tuple[int, int, bytes]] = []
        forgotten: list[tuple[int, int]] = []
        for write in writes:
            key = self._create(write) if write.fence == NEW else self._key_of(write)
            if not isinstance(key, int):
                results.append(key)
                continue
            results.append(None)
            if write.fence == NEW:
                owned[write.session_id] = _Owned(key, FIRST_FENCE)
            else:
                counters.append((write.next_step, write.last_use_s, key))
                if write.entry is not None:
                    self._put_entry(key, write.entry)
            if write.releases or _ends(write):
                owned[write.session_id] = None
            if _ends(write):
                continue
            if write.snapshot is not None:
                self._put_snapshot(key, write.snapshot)
            if write.record is not None:
                records.append((key, write.record.first_step, write.record.content))
            if write.forget_before is not None:
                forgotten.append((key, write.forget_before))
        execute_for_each = self._writer.executemany
        execute_for_each("UPDATE session SET next_step = ?, last_use_s = ? WHERE key = ?", counters)
        execute_for_each("INSERT INTO record (session_key, first_step, content) VALUES (?, ?, ?)", records)
        execute_for_each(
            "DELETE FROM record WHERE session_key = ?1 AND first_step < "
            "(SELECT max(first_step) FROM record WHERE session_key = ?1 AND first_step <= ?2)",
            forgotten,
        )
        return results

    def _create(self, write: Write) -> int | EntryExists | RequestExists:
        entry = write.entry
        assert entry is not None, "a new session comes with its entry"
        if entry.request_id and (known := self._find(self._writer, "request_id", entry.request_id)):
            return RequestExists(known)
        if known := self._find(self._writer, "id", write.session_id):
            return EntryExists(known)
        row = (
            write.session_id,
            entry.model_name,
            entry.request_id,
            write.next_step,
            write.last_use_s,
            entry.content,
        )
        key = self._writer.execute(
            "INSERT INTO session (id, model_name, request_id, next_step, last_use_s, content) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            row,
        ).lastrowid
        assert key is not None
        return key

    def _key_of(self, write: Write) -> int | Fenced:
        ownership = self._owned.get(write.session_id)
        return ownership.key if ownership is not None and ownership.fence == write.fence else Fenced()

    def _put_entry(self, key: int, entry: Entry) -> None:
        ends = entry.end_time_s is not None
        if ends:
            self._writer.execute("DELETE FROM record WHERE session_key = ?", (key,))
            self._put_snapshot(key, b"")
        self._writer.execute(
            "UPDATE session SET content = ?, end_time_s = ? WHERE key = ?",
            (entry.content, time.time() if ends else None, key),
        )

    def _put_snapshot(self, key: int, snapshot: bytes) -> None:
        if snapshot:
            self._writer.execute(
                "REPLACE INTO snapshot (session_key, content) VALUES (?, ?)", (key, snapshot)
            )
        else:
            self._writer.execute("DELETE FROM snapshot WHERE session_key = ?", (key,))

    def claim(self, session_ids: Sequence[str]) -> list[Claim | OwnedElsewhere | Entry | None]:
        """See Store.claim."""
        fences: dict[str, int] = {}
        with self._write_lock, _translated(self._path):
            for session_id in session_ids:
                living = "SELECT key FROM session WHERE id = ? AND end_time_s IS NULL"
                if row := self._writer.execute(living, (session_id,)).fetchone():
                    fences[session_id] = self._last_fence = self._last_fence + 1
                    self._owned[session_id] = _Owned(row[0], self._last_fence)
        # Whatever the owner before has committed is in the file by now, and nothing more of it comes.
        with self._reading() as reader:
            return [
                self._read_claim(reader, session_id, fences[session_id])
                if session_id in fences
                else self._find(reader, "id", session_id)
                for session_id in session_ids
            ]

    def _read_claim(self, reader: sqlite3.Connection, session_id: str, fence: int) -> Claim:
        entry = self._find(reader, "id", session_id)
        assert entry is not None, "only its owner ends a session"
        (key,) = reader.execute("SELECT key FROM session WHERE id = ?", (session_id,)).fetchone()
        snapshot = reader.execute("SELECT content FROM snapshot WHERE session_key = ?", (key,)).fetchone()
        records = reader.execute(
            "SELECT first_step, content FROM record WHERE session_key = ? ORDER BY first_step", (key,)
        )
        return Claim(entry, fence, snapshot[0] if snapshot else b"", [Record(*row) for row in records])

    def look(self, session_id: str) -> Entry | None:
        """See Store.look."""
        with self._reading() as reader:
            return self._find(reader, "id", session_id)

    def find_request(self, request_id: str) -> Entry | None:
        """See Store.find_request."""
        with self._reading() as reader:
            return self._find(reader, "request_id", request_id) if request_id else None

    def _find(
        self, connection: sqlite3.Connection, column: Literal["id", "request_id"], value: str
    ) -> Entry | None:
        # The second condition lets SQLite use the index of requests.
        row = connection.execute(f"{_ENTRY} WHERE {column} = ? AND {column} != ''", (value,)).fetchone()
        return Entry(*row) if row else None

    def page(self, after: str, size: int, model_name: str) -> list[Entry]:
        """See Store.page."""
        of_model = "AND model_name = ?3" if model_name else ""
        query = f"{_ENTRY} WHERE end_time_s IS NULL AND id > ?1 {of_model} ORDER BY id LIMIT ?2"
        with self._reading() as reader:
            parameters = (after, size, model_name) if model_name else (after, size)
            return [Entry(*row) for row in reader.execute(query, parameters)]

    def count(self, first: str, before: str, model_name: str) -> int:
        """See Store.count."""
        query = (
            "SELECT count(*) FROM session WHERE end_time_s IS NULL AND id >= ?1 AND id < ?2 "
            "AND (?3 = '' OR model_name = ?3)"
        )
        with self._reading() as reader:
            (num,) = reader.execute(query, (first, before, model_name)).fetchone()
            return int(num)

    def find_idle(self, last_use_before_s: float, size: int) -> list[str]:
        """See Store.find_idle."""
        query = (
            "SELECT id FROM session WHERE end_time_s IS NULL AND last_use_s < ? ORDER BY last_use_s LIMIT ?"
        )
        with self._reading() as reader:
            return [session_id for (session_id,) in reader.execute(query, (last_use_before_s, size))]

    def time_of_ended(self, number: int) -> float:
        """See Store.time_of_ended."""
        with self._reading() as reader:
            found = reader.execute(
                "SELECT end_time_s FROM session WHERE end_time_s IS NOT NULL ORDER BY end_time_s DESC LIMIT 1 OFFSET ?",
                (number,),
            ).fetchone()
        return float(found[0]) if found else -math.inf

    def purge(self, ended_before_s: float) -> int:
        """See Store.purge."""
        num_purged = 0
        while True:
            with self._write_lock:  # given back after each piece, so that steps go on between
                num_now = self._forget_ended(ended_before_s)
            num_purged += num_now
            if num_now < _FORGOTTEN_AT_ONCE:
                return num_purged

    def beat(self) -> Beat:
        """See Store.beat."""
        with self._write_lock:
            now_s = time.monotonic()
            self._service_time_s += min(now_s - self._last_beat_s, _LONGEST_BEAT_GAP_S)
            self._last_beat_s = now_s
            if self._service_time_s - self._saved_time_s >= _SAVE_ALONE_AFTER_S:
                self._save_service_time_alone()
            return Beat(self._service_time_s, time.time(), lease_valid_until_s=float("inf"))

    def _save_service_time_alone(self) -> None:
        with suppress(StoreFullError), self._transaction():  # a full store's next commit tells of it
            self._save_service_time()
        self._saved_time_s = self._service_time_s

    def _save_service_time(self) -> None:
        self._writer.execute("UPDATE service SET time_s = ?", (self._service_time_s,))

    def release(self, session_id: str) -> None:
        """See Store.release."""
        with self._write_lock:
            self._owned.pop(session_id, None)

    def ask_for(self, session_id: str, owner: str) -> None:
        """See Store.ask_for: there is nobody to ask."""

    def asked_for(self, timeout_s: float) -> list[str]:
        """See Store.asked_for: nobody asks."""
        self._closed.wait(timeout_s)
        return []

    def close(self) -> None:
        """See Store.close."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._write_lock, self._read_lock:
            try:
                with suppress(StoreFullError), self._transaction() as writer:
                    self._save_service_time()
                    writer.execute("UPDATE service SET is_open = 0")
            finally:
                self._reader.close()
                self._writer.close()
                # It stays where a reader still has the file open.
                self._guard.close(is_whole=not _log_of(self._path).exists())

    def _connect(self) -> sqlite3.Connection:
        # Transactions are begun by hand; locks guard what threads share.
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        return connection

    def _set_up(self, sync: Literal["full", "normal"]) -> Durability:
        self._writer.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # of a new file
        mode = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise StoreSettingsError(
                f"{self._path} cannot have a write-ahead log (its journal mode stays {mode!r}): put it on a local disk"
            )
        self._writer.execute(f"PRAGMA synchronous = {sync.upper()}")
        self._writer.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        self._writer.execute(f"PRAGMA journal_size_limit = {_CHECKPOINT_PAGES * _PAGE_BYTES}")
        durability = {1: Durability.PROCESS, 2: Durability.POWER}[self._pragma("synchronous")]
        if sync == "full" and durability != Durability.POWER:
            raise StoreSettingsError(
                f"{self._path} cannot be written through to disk: start with --sync normal"
            )
        return durability

    def _limit_pages(self, spare: int) -> None:
        if self._max_pages is not None:
            self._writer.execute(f"PRAGMA max_page_count = {self._max_pages + spare}")

    def _pragma(self, name: str) -> int:
        return int(self._writer.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; for who holds the write lock."""
        with _translated(self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                num_changes = self._writer.total_changes
                yield self._writer
                if has_changed := self._writer.total_changes != num_changes:
                    self._num_commits += (
                        1  # also if it fails: a commit that is said to have failed may be there
                    )
                    self._writer.execute("UPDATE service SET num_commits = ?", (self._num_commits,))
                self._writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # some failures have rolled back by themselves
                    self._writer.execute("ROLLBACK")
                raise
            if has_changed:
                self._guard.note(self._num_commits)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The file as it is at one moment."""
        with self._read_lock, _translated(self._path):
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                with suppress(sqlite3.Error):
                    self._reader.execute("COMMIT")


def _ends(write: Write) -> bool:
    return write.entry is not None and write.entry.end_time_s is not None


def _check_whole(path: Path, count: CommitCount | None, count_path: Path) -> None:
    """That the file and its log have all that was committed, before anything changes them.

    Raises:
        StoreSettingsError: they have not.
        sqlite3.Error: they cannot be read.
    """
    # A connection that may not write leaves the log as it is when it is closed.
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version < 2:  # before there were counts, or a file that is to be made
            num_commits, was_open = 0, False
        else:
            num_commits, was_open = connection.execute("SELECT num_commits, is_open FROM service").fetchone()
        problem = ""
        if was_open and count is None:
            (problem,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    finally:
        connection.close()
    if count is None:
        if was_open and problem != "ok":
            raise StoreSettingsError(
                f"{path} is damaged ({problem.splitlines()[-1]}), as it is when its log was lost: restore it from a "
                "backup, or move it away to begin with no sessions"
            )
        if was_open:
            log.warning(
                "the session store was not closed in good order, and its count of commits is gone: whether the last "
                "of them are lost cannot be told",
                path=str(path),
                count=str(count_path),
            )
        return
    num_lost = count.num_commits - num_commits
    if num_lost <= 0:
        return
    if not count.may_have_lost_some:
        raise StoreSettingsError(
            f"the last {num_lost} commits to {path} are lost, which callers were answered for: its log "
            f"{_log_of(path)} is damaged or was removed. Put the log back as it was. Or restore a backup, or go on "
            f"with what is left, where those messages and sessions never were; then remove {count_path} to say so"
        )
    log.warning(
        "the last commits before the machine went down are lost, as --sync normal allows: callers that go on from "
        "there are refused, and begin their sessions anew",
        path=str(path),
        num_lost=num_lost,
    )


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _check_ours(connection: sqlite3.Connection, path: Path) -> None:
    """A new file, or one of ours that this version can read."""
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if num_tables and application_id != _APPLICATION_ID:
        raise StoreSettingsError(
            f"{path} is the database of another program: give --store the path of a file of its own"
        )
    if version > len(_SCHEMA_STEPS):
        raise StoreSettingsError(
            f"{path} was written by a newer version of this server (schema {version}, this one knows up to "
            f"{len(_SCHEMA_STEPS)}): start that version, or keep the sessions elsewhere"
        )


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring a file to the newest schema, from none at all too; all of it or nothing."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    steps = "".join(_SCHEMA_STEPS[version:])
    if steps:
        connection.executescript(
            f"BEGIN IMMEDIATE; {steps} PRAGMA application_id = {_APPLICATION_ID};"
            f"PRAGMA user_version = {len(_SCHEMA_STEPS)}; COMMIT;"
        )


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _translation(error, path) from error


def _translation(error: Exception, path: Path) -> Exception:
    """A failure of the store as one of ours; a mistake in what we asked of it as it is."""
    primary_code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if primary_code == sqlite3.SQLITE_FULL:
        return StoreFullError()
    if primary_code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorruptError(f"the file {path}")
    if primary_code in _UNAVAILABLE_CODES:
        return StoreUnavailableError(error)
    return error


_UNAVAILABLE_CODES = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
)
