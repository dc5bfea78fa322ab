"""What every store promises, whatever it is made of."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.storage.interface import (
    FIRST_FENCE,
    Claim,
    Durability,
    Entry,
    EntryExists,
    Fenced,
    RequestExists,
    Store,
    Write,
)
from tests.server.storage.conftest import Opening
from tests.server.storage.writes import claim, creation, ending, entry, first_steps, make, message

keeping_steps = pytest.mark.parametrize("kind", ["sqlite", "redis"], indirect=True)
"""For stores that keep records and snapshots."""


def test_a_store_says_what_it_is(store: Store, kind: str):
    assert store.kind == kind
    assert store.keeps_steps == (kind != "none")
    assert store.is_shared == (kind == "redis")
    assert store.durability == (Durability.VOLATILE if kind == "none" else Durability.PROCESS)
    assert store.replica_id


def test_a_new_session_is_found_by_its_id_and_by_its_request(store: Store):
    made = entry("a", request_id="r", next_step=3, last_use_s=1.25, content=bytes(range(256)))

    assert store.commit(
        [creation("a", request_id="r", next_step=3, last_use_s=1.25, content=bytes(range(256)))]
    ) == [None]

    assert store.look("a") == made
    assert store.find_request("r") == made


def test_what_was_never_made_is_not_known(store: Store):
    make(store, "a")

    assert store.look("b") is None
    assert store.find_request("") is None
    assert store.find_request("r") is None
    assert store.claim(["b"]) == [None]
    assert store.page("", 10, "copy") == [entry("a")]


def test_an_id_is_given_once(store: Store):
    make(store, "a", content=b"first")

    assert store.commit([creation("a", content=b"second"), creation("b")]) == [
        EntryExists(entry("a", content=b"first")),
        None,
    ]
    assert store.look("a") == entry("a", content=b"first")


def test_a_request_makes_one_session_whatever_id_it_comes_with(store: Store):
    make(store, "a", request_id="r")

    again = store.commit(
        [creation("a", request_id="r"), creation("b", request_id="r"), creation("a", request_id="s")]
    )

    known = entry("a", request_id="r")
    assert again == [RequestExists(known), RequestExists(known), EntryExists(known)]
    assert store.look("b") is None
    assert store.find_request("s") is None


def test_one_commit_can_hold_the_same_request_twice(store: Store):
    results = store.commit([creation("a", request_id="r"), creation("b", request_id="r")])

    assert results == [None, RequestExists(entry("a", request_id="r"))]


def test_a_message_moves_the_counter_and_the_time_of_use(store: Store):
    make(store, "a", "b")

    assert store.commit([message("a", 0, 5), message("b", 0)]) == [None, None]

    assert store.look("a") == entry("a", next_step=5, last_use_s=5.0)
    assert store.look("b") == entry("b", next_step=1, last_use_s=1.0)


def test_a_commit_of_nothing_is_nothing(store: Store):
    assert store.commit([]) == []
    assert store.claim([]) == []


@keeping_steps
def test_a_claim_brings_entry_snapshot_and_records_in_order(store: Store):
    make(store, "a", snapshot=b"\0state")
    writes = [message("a", step, 2) for step in range(0, 24, 2)]
    for write in writes:
        assert store.commit([write]) == [None]

    claimed = claim(store, "a")

    assert claimed.entry == entry("a", next_step=24, last_use_s=24.0)
    assert claimed.snapshot == b"\0state"
    assert claimed.records == [write.record for write in writes]


@keeping_steps
def test_records_of_the_same_content_are_kept_apart(store: Store):
    make(store, "a")
    for step in range(3):
        write = message("a", step)
        assert write.record is not None
        store.commit([replace(write, record=replace(write.record, content=b"same"))])

    assert first_steps(claim(store, "a")) == [0, 1, 2]


@keeping_steps
def test_many_sessions_are_claimed_at_once(store: Store):
    make(store, "a", "b", "gone")
    store.commit([message("b", 0), ending("gone")])

    a, unknown, b, gone = store.claim(["a", "?", "b", "gone"])

    assert isinstance(a, Claim)
    assert a.records == []
    assert unknown is None
    assert isinstance(b, Claim)
    assert first_steps(b) == [0]
    assert isinstance(gone, Entry)
    assert gone.end_time_s is not None


def test_every_claim_has_a_fence_of_its_own_and_earlier_ones_are_refused(store: Store):
    make(store, "a")

    first = claim(store, "a")
    second = claim(store, "a")

    assert FIRST_FENCE < first.fence < second.fence
    for old in (FIRST_FENCE, first.fence, second.fence + 1):
        assert store.commit([message("a", 0, fence=old)]) == [Fenced()]
    assert store.commit([message("a", 0, fence=second.fence)]) == [None]
    assert store.look("a") == entry("a", next_step=1, last_use_s=1.0)


@keeping_steps
def test_a_refused_write_changes_nothing_and_holds_nothing_up(store: Store):
    make(store, "a", "b")
    fence = claim(store, "a").fence

    refused = Write(
        "a", FIRST_FENCE, 9, 9.0, record=None, entry=entry("a", content=b"x"), snapshot=b"x", releases=True
    )

    assert store.commit([refused, message("b", 0), message("?", 0)]) == [Fenced(), None, Fenced()]
    assert store.look("a") == entry("a")
    assert store.commit([message("a", 0, fence=fence)]) == [None]
    assert claim(store, "a").snapshot == b""


def test_a_released_session_takes_no_writes_until_it_is_claimed(store: Store):
    make(store, "a", "b")

    assert store.commit([message("a", 0, releases=True)]) == [None]
    store.release("b")
    store.release("unknown")

    assert store.commit([message("a", 1), message("b", 0)]) == [Fenced(), Fenced()]
    assert store.commit([message("a", 1, fence=claim(store, "a").fence)]) == [None]


def test_a_session_can_be_made_without_an_owner(store: Store):
    make(store, "a", releases=True)

    assert store.commit([message("a", 0)]) == [Fenced()]
    assert claim(store, "a").entry == entry("a")


def test_an_entry_is_replaced_whole(store: Store):
    make(store, "a", request_id="r")
    changed = entry("a", request_id="r", next_step=4, last_use_s=2.0, content=b"reset")

    assert store.commit([Write("a", FIRST_FENCE, 4, 2.0, entry=changed)]) == [None]

    assert store.look("a") == changed
    assert store.find_request("r") == changed


@keeping_steps
def test_a_snapshot_takes_the_place_of_the_one_before_and_can_be_taken_away(store: Store):
    make(store, "a", snapshot=b"one")

    store.commit([Write("a", FIRST_FENCE, 0, 0.0, snapshot=b"two")])
    second = claim(store, "a")
    store.commit([Write("a", second.fence, 0, 0.0, snapshot=b"")])

    assert second.snapshot == b"two"
    assert claim(store, "a").snapshot == b""


@keeping_steps
@pytest.mark.parametrize(
    ("before", "kept"), [(0, [0, 3, 6, 9]), (2, [0, 3, 6, 9]), (3, [3, 6, 9]), (8, [6, 9]), (12, [9])]
)
def test_records_before_a_step_are_forgotten_but_the_one_that_holds_it_stays(
    store: Store, before: int, kept: list[int]
):
    make(store, "a", "b")
    for step in (0, 3, 6, 9):
        store.commit([message("a", step, 3), message("b", step, 3)])

    assert store.commit([Write("a", FIRST_FENCE, 12, 12.0, forget_before=before)]) == [None]

    assert first_steps(claim(store, "a")) == kept
    assert first_steps(claim(store, "b")) == [0, 3, 6, 9]


@keeping_steps
def test_a_message_may_bring_its_snapshot_and_what_to_forget_along(store: Store):
    make(store, "a")
    store.commit([message("a", 0, 4)])

    store.commit([message("a", 4, 4, snapshot=b"after 8", forget_before=6)])

    claimed = claim(store, "a")
    assert claimed.snapshot == b"after 8"
    assert first_steps(claimed) == [4]


def test_an_ended_session_is_known_and_takes_nothing(store: Store):
    make(store, "a", request_id="r", snapshot=b"state")
    store.commit([message("a", 0)])

    assert store.commit([ending("a", 1, request_id="r")]) == [None]

    ended = store.look("a")
    assert ended is not None
    assert ended.end_time_s == pytest.approx(store.beat().time_s, abs=5)
    assert ended == entry("a", request_id="r", next_step=1, content=b"ended", end_time_s=ended.end_time_s)
    assert store.find_request("r") == ended
    assert store.claim(["a"]) == [ended]
    assert store.commit([message("a", 1), creation("a"), creation("b", request_id="r")]) == [
        Fenced(),
        EntryExists(ended),
        RequestExists(ended),
    ]
    assert store.page("", 10, "") == []
    assert store.find_idle(1e9, 10) == []


def test_ended_sessions_are_purged_when_they_ended_before_the_time(store: Store):
    make(store, "a", request_id="r")
    make(store, "lives")
    store.commit([message("a", 0)])
    store.commit([ending("a", 1, request_id="r")])
    ended = store.look("a")
    assert ended is not None
    assert ended.end_time_s is not None

    assert store.purge(ended.end_time_s) == 0
    assert store.purge(ended.end_time_s + 1) == 1

    assert store.look("a") is None
    assert store.find_request("r") is None
    assert store.look("lives") == entry("lives")
    make(store, "a", request_id="r")
    if store.keeps_steps:
        assert claim(store, "a").records == []


def test_the_time_of_an_ended_session_is_found_by_how_many_have_ended_since(store: Store):
    make(store, "a", "b", "c", "lives")
    for session_id in ("b", "a", "c"):
        store.commit([ending(session_id, 1)])
    times_s = sorted((store.look(session_id).end_time_s for session_id in ("a", "b", "c")), reverse=True)

    assert [store.time_of_ended(number) for number in range(4)] == [*times_s, -math.inf]


def test_pages_go_through_living_sessions_in_order_of_bytes(store: Store):
    ids = ["a", "B", "z", "é", "aa", "a-1", "\uffee", "\U0001f600"]
    make(store, *ids)
    make(store, "other", model_name="recall")
    make(store, "over")
    store.commit([ending("over")])

    seen: list[str] = []
    while page := store.page(seen[-1] if seen else "", 3, "copy"):
        assert len(page) <= 3
        seen += [found.session_id for found in page]

    assert seen == sorted(ids, key=str.encode)
    assert store.page("", 10, "recall") == [entry("other", model_name="recall")]
    assert [found.session_id for found in store.page("a-1", 3, "")] == ["aa", "other", "z"]
    assert store.page("", 10, "nobody's") == []


def test_living_sessions_are_counted_within_a_range_of_ids(store: Store):
    make(store, "+a/1", "+a/2", "+a0", "+b/1", "1", "2")
    make(store, "+a/3", "3", model_name="recall")
    make(store, "+a/4")
    store.commit([ending("+a/4")])

    assert store.count("+a/", "+a0", "") == 3
    assert store.count("+a/", "+a0", "copy") == 2
    assert store.count(",", "\x7f", "") == 3
    assert store.count("", "\x7f", "recall") == 2
    assert store.count("+c/", "+c0", "") == 0


def test_the_longest_idle_are_found_first(store: Store):
    make(store, "used at 3", last_use_s=3.0)
    make(store, "used at 1", last_use_s=1.0)
    make(store, "used at 2", last_use_s=2.0, releases=True)
    make(store, "over", last_use_s=0.5)
    store.commit([ending("over")])

    assert store.find_idle(1.0, 10) == []
    assert store.find_idle(3.0, 10) == ["used at 1", "used at 2"]
    assert store.find_idle(9.0, 2) == ["used at 1", "used at 2"]

    store.commit([replace(message("used at 1", 0), last_use_s=7.0)])
    assert store.find_idle(9.0, 10) == ["used at 2", "used at 3", "used at 1"]


def test_the_service_time_goes_on_with_the_beats(store: Store):
    first = store.beat()
    second = store.beat()

    assert 0 <= first.service_time_s <= second.service_time_s < first.service_time_s + 5
    assert first.lease_valid_until_s > 0
    assert first.time_s > 1.7e9


def test_nobody_asks_for_sessions_that_nobody_wants(store: Store):
    store.ask_for("a", "nobody")

    assert store.asked_for(0.01) == []


def test_a_wait_for_being_asked_ends_when_the_store_is_closed(store: Store):
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(store.asked_for, 60.0)
        store.close()

        assert waiting.result(timeout=5) == []


def test_closing_twice_is_closing(store: Store):
    store.close()
    store.close()


@keeping_steps
def test_everything_is_there_when_the_store_is_opened_again(store: Store, opening: Opening):
    make(store, "a", request_id="r", snapshot=b"state")
    store.commit([message("a", 0), creation("b")])
    store.commit([ending("b")])
    gone = store.look("b")
    store.close()

    again = opening()

    assert again.replica_id != store.replica_id
    assert again.look("b") == gone
    claimed = claim(again, "a")
    assert claimed.entry == entry("a", request_id="r", next_step=1, last_use_s=1.0)
    assert claimed.snapshot == b"state"
    assert first_steps(claimed) == [0]
    assert again.commit([message("a", 1, fence=claimed.fence)]) == [None]


def test_threads_can_use_a_store_together(store: Store):
    num_threads, num_messages = 4, 25
    together = threading.Barrier(num_threads)

    def one_session(name: str) -> None:
        together.wait()
        make(store, name)
        for step in range(num_messages):
            assert store.commit([message(name, step)]) == [None]
            found = store.look(name)
            assert found is not None
            assert found.next_step == step + 1
            store.page("", 3, "")
            store.find_idle(1e9, 3)
            store.beat()

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(one_session, [f"s{number}" for number in range(num_threads)]))

    for number in range(num_threads):
        assert claim(store, f"s{number}").entry.next_step == num_messages


def test_threads_that_claim_the_same_session_get_different_fences(store: Store):
    make(store, "a")

    with ThreadPoolExecutor(4) as threads:
        fences = [claimed.fence for claimed in threads.map(lambda _: claim(store, "a"), range(40))]

    assert len(set(fences)) == 40
    results = store.commit([message("a", 0, fence=max(fences))])
    assert results == [None]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["create", "message", "snapshot", "forget", "release", "claim", "end", "purge"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 6),
    ),
    max_size=30,
)


class Model:
    """What sessions should be, by dictionaries alone."""

    def __init__(self, keeps_steps: bool) -> None:
        self.keeps_steps = keeps_steps
        self.entries: dict[str, Entry] = {}
        self.fences: dict[str, int] = {}
        self.snapshots: dict[str, bytes] = {}
        self.records: dict[str, list[int]] = {}

    def is_ours(self, session_id: str) -> bool:
        return session_id in self.fences

    def ends(self, session_id: str) -> None:
        for kept in (self.fences, self.snapshots, self.records):
            kept.pop(session_id)  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_history_leaves_what_a_dictionary_would_hold(store: Store, steps: list[tuple[str, str, int]]):
    prefix = f"{next(_numbers)} "
    model = Model(store.keeps_steps)
    for what, name, number in steps:
        _do(store, model, what, prefix + name, number)

    for name in ("a", "b", "c"):
        session_id = prefix + name
        assert store.look(session_id) == model.entries.get(session_id)
        (claimed,) = store.claim([session_id])
        if isinstance(claimed, Claim):
            assert claimed.entry == model.entries[session_id]
            assert claimed.snapshot == (model.snapshots[session_id] if store.keeps_steps else b"")
            assert first_steps(claimed) == (model.records[session_id] if store.keeps_steps else [])
        else:
            assert claimed == model.entries.get(session_id)


_numbers = itertools.count()


def _do(store: Store, model: Model, what: str, session_id: str, number: int) -> None:
    known = model.entries.get(session_id)
    fence = model.fences.get(session_id, FIRST_FENCE)
    if what == "create":
        write = creation(session_id, snapshot=b"%d" % number)
        refused: object = EntryExists(known) if known else None
        assert store.commit([write]) == [refused]
        if not known:
            assert write.entry is not None
            model.entries[session_id] = write.entry
            model.fences[session_id] = FIRST_FENCE
            model.snapshots[session_id] = b"%d" % number
            model.records[session_id] = []
    elif what == "claim":
        (claimed,) = store.claim([session_id])
        if isinstance(claimed, Claim):
            model.fences[session_id] = claimed.fence
        assert isinstance(claimed, Claim) == (session_id in model.records)
    elif what == "release":
        store.release(session_id)
        model.fences.pop(session_id, None)
    elif what == "purge":
        store.purge(1e12)
        model.entries = {id_: kept for id_, kept in model.entries.items() if kept.end_time_s is None}
    else:
        next_step = known.next_step if known else 0
        last_use_s = float(number)
        write = {
            "message": replace(
                message(session_id, next_step, number + 1, fence=fence), last_use_s=last_use_s
            ),
            "snapshot": Write(session_id, fence, next_step, last_use_s, snapshot=b"x" * number),
            "forget": Write(session_id, fence, next_step, last_use_s, forget_before=number),
            "end": ending(session_id, next_step, fence=fence, last_use_s=last_use_s),
        }[what]
        owned = model.is_ours(session_id)
        assert store.commit([write]) == [None if owned else Fenced()]
        if not owned:
            return
        assert known is not None
        model.entries[session_id] = replace(known, next_step=write.next_step, last_use_s=last_use_s)
        records = model.records[session_id]
        if what == "message":
            records.append(next_step)
        elif what == "snapshot":
            model.snapshots[session_id] = b"x" * number
        elif what == "forget":
            straddling = max((step for step in records if step <= number), default=0)
            records[:] = [step for step in records if step >= straddling]
        else:
            ended = store.look(session_id)
            assert ended is not None
            assert ended.end_time_s is not None
            model.entries[session_id] = replace(
                model.entries[session_id], content=b"ended", end_time_s=ended.end_time_s
            )
            model.ends(session_id)
