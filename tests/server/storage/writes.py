"""Writes as the server makes them."""

from __future__ import annotations

from server.storage.interface import FIRST_FENCE, NEW, Claim, Entry, Record, Store, Write


def entry(session_id: str, **fields: object) -> Entry:
    defaults: dict[str, object] = {
        "model_name": "copy",
        "request_id": "",
        "next_step": 0,
        "last_use_s": 0.0,
        "content": b"entry of " + session_id.encode(),
    }
    return Entry(session_id, **(defaults | fields))  # type: ignore[arg-type]


def creation(
    session_id: str, *, snapshot: bytes | None = None, releases: bool = False, **fields: object
) -> Write:
    made = entry(session_id, **fields)
    return Write(
        session_id, NEW, made.next_step, made.last_use_s, entry=made, snapshot=snapshot, releases=releases
    )


def message(
    session_id: str, first_step: int, num_steps: int = 1, *, fence: int = FIRST_FENCE, **fields: object
) -> Write:
    """A message that was applied; last used at the time of its last step."""
    next_step = first_step + num_steps
    record = Record(first_step, f"{session_id} {first_step}+{num_steps}".encode())
    return Write(session_id, fence, next_step, float(next_step), record=record, **fields)  # type: ignore[arg-type]


def ending(session_id: str, next_step: int = 0, *, fence: int = FIRST_FENCE, **fields: object) -> Write:
    ended = entry(session_id, next_step=next_step, content=b"ended", end_time_s=1.0, **fields)
    return Write(session_id, fence, next_step, ended.last_use_s, entry=ended)


def make(store: Store, *session_ids: str, **fields: object) -> None:
    assert store.commit([creation(session_id, **fields) for session_id in session_ids]) == [None] * len(
        session_ids
    )  # type: ignore[arg-type]


def claim(store: Store, session_id: str) -> Claim:
    (claimed,) = store.claim([session_id])
    assert isinstance(claimed, Claim), claimed
    return claimed


def first_steps(claimed: Claim) -> list[int]:
    return [record.first_step for record in claimed.records]
