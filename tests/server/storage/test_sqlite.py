"""What the SQLite store promises beyond every store: its file, its lock, its limits and its clock."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from server.errors import StoreCorruptError, StoreFullError, StoreSettingsError, StoreUnavailableError
from server.storage import sqlite as sqlite_store
from server.storage.interface import FIRST_FENCE, Durability, Fenced, Record, Write
from server.storage.sqlite import SqliteStore
from tests.server.storage.writes import claim, creation, ending, entry, first_steps, make, message

ROOT = Path(__file__).parents[3]
Open = Callable[..., SqliteStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def open_sqlite(path: Path) -> Iterator[Open]:
    opened: list[SqliteStore] = []

    def open_once(**settings: object) -> SqliteStore:
        opened.append(SqliteStore(path, **({"sync": "normal"} | settings)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_once
    for store in opened:
        store.close()


def large_message(session_id: str, step: int, num_bytes: int = 20_000) -> Write:
    return Write(session_id, FIRST_FENCE, step + 1, 0.0, record=Record(step, os.urandom(num_bytes)))


def fill(store: SqliteStore, session_id: str) -> int:
    """Write until there is no room; returns how many messages there was room for."""
    for step in range(1000):
        (result,) = store.commit([large_message(session_id, step)])
        if result is not None:
            assert isinstance(result, StoreFullError)
            return step
    raise AssertionError("there is room without end")


def test_full_sync_survives_power_loss_and_normal_sync_the_process(open_sqlite: Open):
    full = open_sqlite(sync="full")
    assert full.durability == Durability.POWER
    full.close()

    assert open_sqlite(sync="normal").durability == Durability.PROCESS


def test_a_second_server_is_refused_until_the_first_has_gone(open_sqlite: Open, path: Path):
    first = open_sqlite()

    with pytest.raises(
        StoreSettingsError, match=rf"another server keeps its sessions in {path.parent}.*stop it"
    ):
        open_sqlite()

    first.close()
    open_sqlite()


def test_a_second_server_is_refused_by_whatever_name_it_knows_the_file(
    open_sqlite: Open, path: Path, tmp_path: Path
):
    open_sqlite()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.db").symlink_to(path)

    with pytest.raises(StoreSettingsError, match="another server keeps its sessions"):
        SqliteStore(tmp_path / "elsewhere" / "link.db", "normal")


def test_a_second_server_is_refused_by_a_hard_link_to_the_file(open_sqlite: Open, path: Path, tmp_path: Path):
    open_sqlite()
    other = tmp_path / "other.db"
    other.hardlink_to(path)

    with pytest.raises(StoreSettingsError, match="another server keeps its sessions"):
        SqliteStore(other, "normal")


def test_a_file_of_several_names_is_refused_since_its_log_goes_by_one(open_sqlite: Open, path: Path):
    make(store := open_sqlite(), "a")
    store.close()
    other = path.with_name("other.db")
    other.hardlink_to(path)

    for name in (path, other):
        with pytest.raises(StoreSettingsError, match=r"has 2 names \(hard links\).*remove the others"):
            SqliteStore(name, "normal")

    other.unlink()
    assert open_sqlite().look("a") == entry("a")


@pytest.mark.parametrize("removed", ["sessions.db.lock", "sessions.db"])
def test_a_second_server_is_refused_when_the_lock_file_or_the_file_itself_was_removed(
    open_sqlite: Open, path: Path, removed: str
):
    first = open_sqlite()
    make(first, "a")
    path.with_name(removed).unlink()

    with pytest.raises(StoreSettingsError, match="another server keeps its sessions"):
        open_sqlite()

    assert first.commit([message("a", 0)]) == [None]


def test_only_commits_that_change_something_are_counted(open_sqlite: Open, path: Path):
    def counted() -> int:
        return int(path.with_name("sessions.db.lock").read_text().split()[-1])

    store = open_sqlite()
    make(store, "a")
    before = counted()

    store.commit([message("a", 0)])
    store.purge(0.0)
    store.commit([message("a", 1, fence=99)])

    assert counted() == before + 1


def test_a_store_whose_commits_cannot_be_counted_is_unavailable(
    open_sqlite: Open, monkeypatch: pytest.MonkeyPatch
):
    store = open_sqlite()
    make(store, "a")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("server.storage.sqlite_guard.os.pwrite", fail)
        with pytest.raises(StoreUnavailableError, match="Input/output error"):
            store.commit([message("a", 0)])

    assert first_steps(claim(store, "a")) == [0]


def test_a_backup_that_was_made_while_a_server_had_the_store_can_be_restored(
    open_sqlite: Open, path: Path, tmp_path: Path
):
    store = open_sqlite()
    make(store, "a")
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(tmp_path / "backup")) as backup:
        live.backup(backup)
    make(store, "b")
    restored = tmp_path / "restored.db"
    (tmp_path / "backup").rename(restored)

    with capture_logs() as logs:
        again = SqliteStore(restored, "normal")

    assert again.look("a") == entry("a")
    assert again.look("b") is None
    assert [log["event"] for log in logs if "count of commits is gone" in log["event"]]
    again.close()


def test_a_file_that_lost_its_log_and_its_count_and_is_no_whole_database_is_refused(
    open_sqlite: Open, path: Path
):
    store = open_sqlite()
    make(store, "a")
    store.close()
    database = sqlite3.connect(path)
    database.execute("UPDATE service SET is_open = 1")
    database.execute("PRAGMA writable_schema = 1")
    database.execute("UPDATE sqlite_schema SET rootpage = 2 WHERE name = 'living_by_use'")
    database.commit()
    database.close()

    with pytest.raises(StoreSettingsError, match=r"is damaged \(.*\), as it is when its log was lost"):
        open_sqlite()


def test_directories_are_made(tmp_path: Path):
    SqliteStore(tmp_path / "not" / "there" / "sessions.db", "full").close()

    assert (tmp_path / "not" / "there" / "sessions.db").exists()


def test_a_place_that_can_hold_no_directory_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreSettingsError, match=r"cannot write to .*/file.*choose another directory"):
        SqliteStore(tmp_path / "file" / "sessions.db", "full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_to_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)

    with pytest.raises(StoreSettingsError, match="let the server's user write there"):
        SqliteStore(tmp_path / "sessions.db", "full")


def test_a_file_that_is_no_database_is_refused_and_left_alone(open_sqlite: Open, path: Path):
    path.write_bytes(b"hello " * 1000)

    with pytest.raises(
        StoreSettingsError, match=r"not a database.*restore it from a backup, or move it away"
    ):
        open_sqlite()

    assert path.read_bytes() == b"hello " * 1000
    path.unlink()
    open_sqlite()  # the lock is free again


def test_a_directory_in_the_place_of_the_file_is_refused(open_sqlite: Open, path: Path):
    path.mkdir()

    with pytest.raises(StoreSettingsError, match="Is a directory"):
        open_sqlite()


def test_the_database_of_another_program_is_refused(open_sqlite: Open, path: Path):
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE session (id TEXT)")
    other.close()

    with pytest.raises(StoreSettingsError, match="database of another program"):
        open_sqlite()


def test_a_file_of_a_newer_version_is_refused(open_sqlite: Open, path: Path):
    open_sqlite().close()
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 99")
    newer.close()

    with pytest.raises(StoreSettingsError, match=r"schema 99, this one knows up to 2.*start that version"):
        open_sqlite()


def test_a_file_of_an_older_version_is_brought_up_to_date(
    open_sqlite: Open, path: Path, monkeypatch: pytest.MonkeyPatch
):
    old = open_sqlite()
    make(old, "a")
    old.close()

    steps = (*sqlite_store._SCHEMA_STEPS, "CREATE TABLE added (x);", "INSERT INTO added VALUES (1);")
    monkeypatch.setattr(sqlite_store, "_SCHEMA_STEPS", steps)
    new = open_sqlite()

    assert new.look("a") == entry("a")
    new.close()
    migrated = sqlite3.connect(path)
    assert migrated.execute("SELECT x FROM added").fetchall() == [(1,)]
    assert migrated.execute("PRAGMA user_version").fetchone() == (4,)
    migrated.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    open_sqlite: Open, path: Path, monkeypatch: pytest.MonkeyPatch
):
    open_sqlite().close()

    with monkeypatch.context() as patch:
        steps = (*sqlite_store._SCHEMA_STEPS, "CREATE TABLE added (x);", "INSERT INTO nowhere VALUES (1);")
        patch.setattr(sqlite_store, "_SCHEMA_STEPS", steps)
        with pytest.raises(StoreSettingsError, match="nowhere"):
            open_sqlite()

    make(open_sqlite(), "a")


def test_a_full_store_says_so_and_changes_nothing(open_sqlite: Open):
    store = open_sqlite(max_bytes=1_000_000)
    make(store, "a", "b")
    room = fill(store, "a")

    (full, also_full) = store.commit([large_message("a", room), message("b", 0)])

    assert isinstance(full, StoreFullError)
    assert isinstance(also_full, StoreFullError)
    assert store.look("a") == entry("a", next_step=room)
    assert store.look("b") == entry("b")
    assert first_steps(claim(store, "a")) == list(range(room))
    assert 30 < room < 50


def test_a_full_store_has_room_again_once_sessions_end(open_sqlite: Open):
    store = open_sqlite(max_bytes=1_000_000)
    make(store, "a", "b")
    room = fill(store, "a")

    assert store.commit([ending("a", room)]) == [None]

    assert store.commit([large_message("b", 0)]) == [None]


def test_sessions_can_end_in_the_commit_that_finds_the_store_full(open_sqlite: Open):
    store = open_sqlite(max_bytes=1_000_000)
    make(store, "a", "b")
    room = fill(store, "a")

    (full, ended, fenced) = store.commit([large_message("b", 0, 2_000_000), ending("a", room), ending("?")])

    assert isinstance(full, StoreFullError)
    assert ended is None
    assert fenced == Fenced()
    assert store.look("b") == entry("b")
    assert store.claim(["a"]) == [store.look("a")]


def test_the_limit_holds_after_the_store_was_opened_again(open_sqlite: Open, path: Path):
    store = open_sqlite(max_bytes=1_000_000)
    make(store, "a")
    room = fill(store, "a")
    store.close()

    assert path.stat().st_size <= 1_000_000
    again = open_sqlite(max_bytes=1_000_000)
    fence = claim(again, "a").fence
    assert isinstance(
        again.commit([Write("a", fence, room + 1, 0.0, record=Record(room, bytes(20_000)))])[0],
        StoreFullError,
    )


def damage(path: Path, table: str) -> None:
    """Overwrite a table's first page."""
    database = sqlite3.connect(path)
    (page,) = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
    database.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(os.urandom(page_bytes))


def test_a_damaged_file_is_told_from_one_that_cannot_be_reached(open_sqlite: Open, path: Path):
    store = open_sqlite()
    make(store, "a", "b")
    store.close()
    damage(path, "session")

    again = open_sqlite()

    for call in (lambda: again.look("a"), lambda: again.claim(["a"]), lambda: again.commit([creation("c")])):
        with pytest.raises(StoreCorruptError, match=r"sessions\.db is damaged"):
            call()


def test_a_file_too_damaged_to_open_is_refused(open_sqlite: Open, path: Path):
    open_sqlite().close()
    damage(path, "service")

    with pytest.raises(StoreSettingsError, match="restore it from a backup, or move it away"):
        open_sqlite()


def test_a_disk_that_fails_makes_the_store_unavailable_until_it_works_again(open_sqlite: Open, path: Path):
    store = open_sqlite()
    make(store, "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("sessions.db-wal").stat().st_size, limits[1]))
    try:
        with pytest.raises(StoreUnavailableError, match="disk I/O error"):
            store.commit([message("a", 0)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert store.look("a") == entry("a")
    assert store.commit([message("a", 0)]) == [None]
    assert first_steps(claim(store, "a")) == [0]


def test_a_file_that_another_program_holds_is_unavailable_and_then_works_again(
    open_sqlite: Open, path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sqlite_store, "_BUSY_TIMEOUT_S", 0.05)
    store = open_sqlite()
    make(store, "a")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreUnavailableError, match="locked"):
        store.commit([message("a", 0)])
    assert store.look("a") == entry("a")

    other.execute("ROLLBACK")
    other.close()
    assert store.commit([message("a", 0)]) == [None]


def test_a_commit_that_fails_half_way_leaves_nothing_behind(open_sqlite: Open):
    store = open_sqlite()
    make(store, "a", "b")
    store.commit([message("b", 0)])

    with pytest.raises(sqlite3.IntegrityError):  # a record that is there already: a mistake of the caller's
        store.commit([message("a", 0), creation("c"), message("b", 0)])

    assert store.look("a") == entry("a")
    assert store.look("c") is None
    assert store.commit([message("a", 0), message("b", 1)]) == [None, None]
    assert store.commit([message("c", 0)]) == [Fenced()]


def test_every_acknowledged_commit_survives_kill_9(path: Path, open_sqlite: Open):
    writer = f"""
from pathlib import Path
from server.storage.sqlite import SqliteStore
from tests.server.storage.writes import make, message
store = SqliteStore(Path({str(path)!r}), "full")
make(store, "a", "b")
for step in range(1_000_000):
    assert store.commit([message("a", step), message("b", step)]) == [None, None]
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", writer], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "200\n":
            process.send_signal(signal.SIGKILL)
            break
    acknowledged = int(([*process.stdout.read().split()] or ["200"])[-1])
    process.wait()

    store = open_sqlite()

    for session_id in ("a", "b"):
        claimed = claim(store, session_id)
        assert first_steps(claimed) == list(range(claimed.entry.next_step))
        assert claimed.entry.next_step in (acknowledged + 1, acknowledged + 2)
    assert store.look("a").next_step == store.look("b").next_step  # type: ignore[union-attr]


def test_downtime_does_not_count_as_service(open_sqlite: Open, monkeypatch: pytest.MonkeyPatch):
    now_s = 1000.0
    monkeypatch.setattr(sqlite_store.time, "monotonic", lambda: now_s)
    store = open_sqlite()
    for _ in range(5):
        now_s += 2
        served_s = store.beat().service_time_s
    store.close()
    now_s += 3600

    again = open_sqlite()

    assert served_s == 10.0
    assert again.beat().service_time_s == 10.0
    now_s += 2
    assert again.beat().service_time_s == 12.0
    now_s += 3600  # the machine slept
    assert again.beat().service_time_s == 12.0 + sqlite_store._LONGEST_BEAT_GAP_S


def test_an_idle_server_writes_once_a_minute(open_sqlite: Open, path: Path, monkeypatch: pytest.MonkeyPatch):
    now_s = 1000.0
    monkeypatch.setattr(sqlite_store.time, "monotonic", lambda: now_s)
    store = open_sqlite()
    log = path.with_name(path.name + "-wal")
    sizes = []

    for _ in range(180):
        now_s += 1
        store.beat()
        sizes.append(log.stat().st_size if log.exists() else 0)

    assert len(set(sizes)) == 4


def test_the_service_time_is_saved_along_with_commits(
    open_sqlite: Open, path: Path, monkeypatch: pytest.MonkeyPatch
):
    now_s = 1000.0
    monkeypatch.setattr(sqlite_store.time, "monotonic", lambda: now_s)
    store = open_sqlite()
    now_s += 5
    store.beat()

    make(store, "a")

    look_on = sqlite3.connect(path)
    assert look_on.execute("SELECT time_s FROM service").fetchone() == (5.0,)
    look_on.close()


def test_claims_read_whole_messages_while_others_are_written(open_sqlite: Open):
    store = open_sqlite()
    make(store, "a", "b")

    def write() -> None:
        for step in range(300):
            assert store.commit([message("b", step)]) == [None]

    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(write)
        while not writing.done():
            found = store.look("b")
            assert found is not None
            assert first_steps(claim(store, "a")) == []
        writing.result()
    assert first_steps(claim(store, "b")) == list(range(300))
