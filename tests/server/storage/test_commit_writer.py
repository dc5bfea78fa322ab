"""The commit writer: what comes together is committed together, in order, and what is not committed is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from server.errors import StoreError, StoreUnavailableError
from server.storage.commit_writer import CommitWriter
from server.storage.interface import NEW, Entry, Refusal, Write
from server.storage.sqlite import SqliteStore


class Held(SqliteStore):
    """A store whose commits wait until they are let go, and may fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync="normal")
        self.has_begun = threading.Event()
        self.may_go = threading.Event()
        self.sizes: list[int] = []
        self.fails = False

    def commit(self, writes: Sequence[Write]) -> list[Refusal | StoreError | None]:
        self.has_begun.set()
        assert self.may_go.wait(20)
        self.sizes.append(len(writes))
        if self.fails:
            raise StoreUnavailableError("the line is cut")
        return super().commit(writes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Held]:
    store = Held(tmp_path / "sessions.sqlite3")
    yield store
    store.close()


def a_session(number: int) -> Write:
    session_id = f"s{number}"
    return Write(session_id, NEW, 0, 0.0, entry=Entry(session_id, "m", "", 0, 0.0, b""))


async def test_changes_that_come_while_a_commit_is_under_way_go_into_the_next_together(store: Held) -> None:
    writer = CommitWriter(lambda: store)
    first = writer.commit([a_session(0)])
    await asyncio.to_thread(store.has_begun.wait, 20)
    others = [writer.commit([a_session(number)]) for number in range(1, 6)]
    while writer.num_queued < 5:
        await asyncio.sleep(0)

    store.may_go.set()

    assert [await each for each in (first, *others)] == [[None]] * 6
    assert store.sizes == [1, 5]
    await asyncio.to_thread(writer.close)


async def test_every_caller_of_a_commit_that_fails_is_told(store: Held) -> None:
    writer = CommitWriter(lambda: store)
    store.fails = True
    store.may_go.set()

    outcomes = await asyncio.gather(*(writer.commit([a_session(number)]) for number in range(3)))

    assert {type(outcome) for (outcome,) in outcomes} == {StoreUnavailableError}
    store.fails = False
    assert await writer.commit([a_session(0)]) == [None]
    await asyncio.to_thread(writer.close)


async def test_what_is_queued_is_written_before_the_writer_closes(store: Held) -> None:
    writer = CommitWriter(lambda: store)
    waiting = writer.commit([a_session(0)])
    await asyncio.sleep(0)

    store.may_go.set()
    await asyncio.to_thread(writer.close)

    assert await waiting == [None]
