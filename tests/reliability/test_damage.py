"""Damage in the store: a session whose snapshot, record or entry is not what was written is refused.

Each kind of damage is done to a session of its own while the server is down, by the store's own tools.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from ntm.v1 import session_service_pb2 as pb
from tests.reliability.helpers import Restart, tried
from tests.server.helpers import GONE, accumulated, random_inputs, refused
from tests.valkey import ValkeyServer

NUM_STEPS = 11
OTHER = "another"
"""A session whose parts are put in the places of others."""


class Files(Protocol):
    """What a store keeps, laid open; None removes a part."""

    def snapshot(self, session_id: str, change: Callable[[bytes], bytes | None]) -> None: ...
    def records(self, session_id: str, change: Callable[[list[bytes]], list[bytes | None]]) -> None: ...
    def content(self, session_id: str, change: Callable[[bytes], bytes]) -> None: ...
    def counter(self, session_id: str, by: int) -> None: ...


class SqliteFile:
    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)

    def close(self) -> None:
        self._connection.close()

    def _key(self, session_id: str) -> int:
        return int(self._one("SELECT key FROM session WHERE id = ?", session_id))  # type: ignore[call-overload]

    def _one(self, query: str, *parameters: object) -> object:
        row = self._connection.execute(query, parameters).fetchone()
        return row[0] if row else b""

    def snapshot(self, session_id: str, change: Callable[[bytes], bytes | None]) -> None:
        key = self._key(session_id)
        old = self._one("SELECT content FROM snapshot WHERE session_key = ?", key)
        assert isinstance(old, bytes)
        new = change(old)
        self._connection.execute("DELETE FROM snapshot WHERE session_key = ?", (key,))
        if new is not None:
            self._connection.execute("INSERT INTO snapshot VALUES (?, ?)", (key, new))

    def records(self, session_id: str, change: Callable[[list[bytes]], list[bytes | None]]) -> None:
        query = "SELECT rowid, content FROM record WHERE session_key = ? ORDER BY first_step"
        rows = self._connection.execute(query, (self._key(session_id),)).fetchall()
        for (row, _), new in zip(rows, change([content for _, content in rows]), strict=True):
            if new is None:
                self._connection.execute("DELETE FROM record WHERE rowid = ?", (row,))
            else:
                self._connection.execute("UPDATE record SET content = ? WHERE rowid = ?", (new, row))

    def content(self, session_id: str, change: Callable[[bytes], bytes]) -> None:
        old = self._one("SELECT content FROM session WHERE id = ?", session_id)
        assert isinstance(old, bytes)
        self._connection.execute("UPDATE session SET content = ? WHERE id = ?", (change(old), session_id))

    def counter(self, session_id: str, by: int) -> None:
        self._connection.execute(
            "UPDATE session SET next_step = next_step + ? WHERE id = ?", (by, session_id)
        )


class ValkeyKeys:
    def __init__(self, server: ValkeyServer) -> None:
        self._client = server.client()

    def close(self) -> None:
        self._client.close()

    def snapshot(self, session_id: str, change: Callable[[bytes], bytes | None]) -> None:
        self._change_field(session_id, "snapshot", change)

    def records(self, session_id: str, change: Callable[[list[bytes]], list[bytes | None]]) -> None:
        key = f"ntm:records:{session_id}"
        steps_and_contents = self._client.lrange(key, 0, -1)
        contents = change(steps_and_contents[1::2])
        self._client.delete(key)
        for step, content in zip(steps_and_contents[::2], contents, strict=True):
            if content is not None:
                self._client.rpush(key, step, content)

    def content(self, session_id: str, change: Callable[[bytes], bytes]) -> None:
        self._change_field(session_id, "content", change)

    def counter(self, session_id: str, by: int) -> None:
        self._client.hincrby(f"ntm:session:{session_id}", "next", by)

    def _change_field(self, session_id: str, field: str, change: Callable[[bytes], bytes | None]) -> None:
        key = f"ntm:session:{session_id}"
        new = change(self._client.hget(key, field) or b"")
        if new is None:
            self._client.hdel(key, field)
        else:
            self._client.hset(key, field, new)


def with_bit_flipped(content: bytes, at: float) -> bytes:
    """One bit of a byte at some part of the length, 0 the first and 1 the last."""
    position = round(at * (len(content) - 1))
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: dict[str, Callable[[Files, str], None]] = {
    "snapshot-torn": lambda files, s: files.snapshot(s, torn),
    "snapshot-empty": lambda files, s: files.snapshot(s, lambda _: b""),
    "snapshot-gone": lambda files, s: files.snapshot(s, lambda _: None),
    "snapshot-of-another": lambda files, s: files.snapshot(s, lambda _: stolen(files.snapshot)),
    "record-torn": lambda files, s: files.records(s, lambda old: [*old[:-1], torn(old[-1])]),
    "record-empty": lambda files, s: files.records(s, lambda old: [b"", *old[1:]]),
    "first-record-gone": lambda files, s: files.records(s, lambda old: [None, *old[1:]]),
    "middle-record-gone": lambda files, s: files.records(s, lambda old: [*old[:-2], None, old[-1]]),
    "last-record-gone": lambda files, s: files.records(s, lambda old: [*old[:-1], None]),
    "records-gone": lambda files, s: files.records(s, lambda old: [None] * len(old)),
    "records-swapped": lambda files, s: files.records(s, lambda old: [*old[:-2], old[-1], old[-2]]),
    "records-of-another": lambda files, s: files.records(s, lambda _: stolen_records(files)),
    "entry-torn": lambda files, s: files.content(s, torn),
    "entry-empty": lambda files, s: files.content(s, lambda _: b""),
    "entry-of-another": lambda files, s: files.content(s, lambda _: stolen(files.content)),
    "counter-ahead": lambda files, s: files.counter(s, 1),
    "counter-behind": lambda files, s: files.counter(s, -1),
}
for place in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
    name = f"bit-at-{place:.1f}".replace(".", "-")
    DAMAGE[f"snapshot-{name}"] = lambda files, s, at=place: files.snapshot(  # type: ignore[misc]
        s, lambda old: with_bit_flipped(old, at)
    )
    DAMAGE[f"record-{name}"] = (
        lambda files, s, at=place: files.records(  # type: ignore[misc]
            s, lambda old: [*old[:-1], with_bit_flipped(old[-1], at)]
        )
    )
    DAMAGE[f"entry-{name}"] = lambda files, s, at=place: files.content(  # type: ignore[misc]
        s, lambda old: with_bit_flipped(old, at)
    )


def stolen(part: Callable[..., None]) -> bytes:
    """The same part of the other session."""
    found: list[bytes] = []
    part(OTHER, lambda old: (found.append(old), old)[1])
    return found[0]


def stolen_records(files: Files) -> list[bytes | None]:
    found: list[bytes | None] = []
    files.records(OTHER, lambda old: (found.extend(old), old)[1])
    return found


@pytest.fixture
def open_files(store: str, request: pytest.FixtureRequest) -> Callable[[], SqliteFile | ValkeyKeys]:
    if store.startswith("sqlite"):
        return lambda: SqliteFile(Path(store.removeprefix("sqlite:///")))
    return lambda: ValkeyKeys(request.getfixturevalue("valkey"))


@pytest.mark.parametrize("by_crash", [False, True])
async def test_a_damaged_session_is_refused_or_right_can_be_deleted_and_harms_no_other(
    restart: Restart, store: str, open_files: Callable[[], SqliteFile | ValkeyKeys], by_crash: bool
) -> None:
    inputs = {name: random_inputs(NUM_STEPS + 2, n) for n, name in enumerate([*DAMAGE, OTHER, "untouched"])}
    caller = await restart(store=store)
    for name, of_session in inputs.items():
        await caller.create("accumulator", name)
        for first in range(0, NUM_STEPS, 2):
            await caller.step(of_session[first : min(first + 2, NUM_STEPS)], name, first_step=first)
    await caller.end(by_crash)

    with closing(open_files()) as files:
        for name, damage in DAMAGE.items():
            damage(files, name)

    caller = await restart(store=store)
    outcomes = {}
    for name, of_session in inputs.items():
        answer = await tried(caller.step(of_session[NUM_STEPS:], name, first_step=NUM_STEPS))
        if not isinstance(answer, str):
            np.testing.assert_array_equal(answer, accumulated(of_session)[NUM_STEPS:], name)
        outcomes[name] = answer if isinstance(answer, str) else "right"
    assert set(outcomes.values()) == {"right", "SESSION_CORRUPT"}
    assert outcomes[OTHER] == outcomes["untouched"] == "right"
    assert {outcomes[name] for name in DAMAGE if name.startswith(("entry", "snapshot"))} == {
        "SESSION_CORRUPT"
    }
    for name in DAMAGE:
        await caller.stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))
        await refused(caller.step(inputs[name][:1], name), GONE, "SESSION_NOT_FOUND")
    np.testing.assert_array_equal(
        await caller.step(inputs["untouched"], "untouched", first_step=0), accumulated(inputs["untouched"])
    )
