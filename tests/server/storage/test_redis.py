"""What the Redis store promises beyond every store: several replicas, leases, and a server that can fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import (
    LeaseLapsedError,
    StoreCorruptError,
    StoreFullError,
    StoreSettingsError,
    StoreUnavailableError,
)
from server.storage.interface import Claim, Durability, Entry, Fenced, OwnedElsewhere, Record, Write
from server.storage.redis import RedisStore
from tests.server.storage.writes import claim, creation, ending, entry, first_steps, make, message
from tests.valkey import ValkeyServer, free_port

Open = Callable[..., RedisStore]
StartValkey = Callable[..., ValkeyServer]


@pytest.fixture
def start_valkey(tmp_path: Path) -> Iterator[StartValkey]:
    started: list[ValkeyServer] = []

    def start(**config: str) -> ValkeyServer:
        started.append(ValkeyServer(tmp_path / f"valkey{len(started)}", **config))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def open_redis(valkey: ValkeyServer) -> Iterator[Open]:
    """Open the store of a server, the shared one if none is given."""
    opened: list[RedisStore] = []

    def open_once(server: ValkeyServer = valkey, **settings: object) -> RedisStore:
        defaults: dict[str, object] = {
            "url": server.url,
            "lease_s": 20.0,
            "sync": "normal",
            "timeout_s": 10.0,
        }
        opened.append(RedisStore(**(defaults | settings)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_once
    for store in opened:
        store.close()


def lapse(server: ValkeyServer, store: RedisStore) -> None:
    """What the server does when a replica has not been heard of for the time of its lease."""
    with server.client() as client:
        assert client.delete(f"ntm:replica:{store.replica_id}") == 1


def until(holds: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_session_is_refused_to_others_while_its_owner_lives(open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    make(ours, "a")

    (refused,) = theirs.claim(["a"])

    assert isinstance(refused, OwnedElsewhere)
    assert refused.entry == entry("a")
    assert refused.owner == ours.replica_id
    assert 0 < refused.lease_left_s <= 20
    assert theirs.commit([message("a", 0)]) == [Fenced()]
    assert ours.commit([message("a", 0)]) == [None]


def test_a_released_session_can_be_claimed_by_another_replica(open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    make(ours, "a", "b")
    ours.commit([message("a", 0, releases=True)])
    ours.release("b")

    a, b = theirs.claim(["a", "b"])

    assert isinstance(a, Claim)
    assert first_steps(a) == [0]
    assert isinstance(b, Claim)
    assert ours.commit([message("a", 1), message("b", 0)]) == [Fenced(), Fenced()]


def test_a_replica_releases_only_what_it_owns(open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    make(ours, "a")

    theirs.release("a")

    assert ours.commit([message("a", 0)]) == [None]


def test_closing_frees_every_session_at_once(open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    make(ours, "a")

    ours.close()

    assert claim(theirs, "a").entry == entry("a")


def test_a_lease_runs_out_unless_it_is_renewed(open_redis: Open):
    ours, theirs = open_redis(lease_s=0.4), open_redis()
    make(ours, "a")
    made_s = time.monotonic()
    while time.monotonic() < made_s + 0.8:
        ours.beat()
        assert isinstance(theirs.claim(["a"])[0], OwnedElsewhere)
        time.sleep(0.02)

    valid_until_s = ours.beat().lease_valid_until_s
    until(lambda: isinstance(theirs.claim(["a"])[0], Claim))

    assert time.monotonic() > valid_until_s


def test_a_lapsed_replica_can_write_claim_and_renew_nothing(valkey: ValkeyServer, open_redis: Open):
    ours = open_redis()
    make(ours, "a", "free")
    ours.release("free")
    lapse(valkey, ours)

    assert ours.commit([message("a", 0), creation("new"), ending("a")]) == [Fenced(), Fenced(), Fenced()]
    with pytest.raises(LeaseLapsedError):
        ours.claim(["free"])
    with pytest.raises(LeaseLapsedError):
        ours.beat()

    assert ours.look("a") == entry("a")
    assert ours.look("new") is None
    assert isinstance(open_redis().claim(["free"])[0], Claim)


def test_late_writes_of_the_owner_before_are_refused(valkey: ValkeyServer, open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    make(ours, "a")
    ours.commit([message("a", 0)])
    lapse(valkey, ours)
    taken = claim(theirs, "a")

    with valkey.client() as client:  # it comes back to life without knowing of it
        client.set(f"ntm:replica:{ours.replica_id}", "")

    assert ours.commit([message("a", 1)]) == [Fenced()]
    assert isinstance(ours.claim(["a"])[0], OwnedElsewhere)
    assert theirs.commit([message("a", 1, fence=taken.fence)]) == [None]


def test_the_lease_is_believed_for_less_than_the_store_grants_from_before_it_was_asked(open_redis: Open):
    store = open_redis(lease_s=20.0)
    before_s = time.monotonic()

    beat = store.beat()

    assert before_s + 17.9 <= beat.lease_valid_until_s <= time.monotonic() + 18.1


def test_idle_sessions_of_another_living_replica_are_left_to_it(valkey: ValkeyServer, open_redis: Open):
    ours, theirs, dead = open_redis(), open_redis(), open_redis()
    make(ours, "ours", last_use_s=1.0)
    make(theirs, "theirs", last_use_s=2.0)
    make(theirs, "free", last_use_s=3.0, releases=True)
    make(dead, "dead's", last_use_s=4.0)
    lapse(valkey, dead)

    assert ours.find_idle(9.0, 10) == ["ours", "free", "dead's"]
    assert ours.find_idle(9.0, 2) == ["ours", "free"]


def test_idle_sessions_are_found_behind_many_that_others_own(open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    theirs.commit([creation(f"theirs {number}", last_use_s=1.0) for number in range(2500)])
    make(ours, "a", "b", last_use_s=2.0)

    assert ours.find_idle(9.0, 1) == ["a"]
    assert ours.find_idle(9.0, 10) == ["a", "b"]


def test_many_ended_sessions_are_purged_at_once(open_redis: Open):
    store = open_redis()
    ids = [f"s{number}" for number in range(1200)]
    make(store, *ids)
    store.commit([ending(session_id) for session_id in ids])

    assert store.purge(1e12) == 1200
    assert store.purge(1e12) == 0


def test_a_replica_asks_another_for_a_session(open_redis: Open):
    ours, theirs = open_redis(), open_redis()

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ours.asked_for, 10.0)
        while not asked.done():  # what nobody listened for yet is lost
            theirs.ask_for("sé", ours.replica_id)
            time.sleep(0.01)

    assert asked.result() == ["sé"]
    ours.asked_for(0.0)
    theirs.ask_for("a", ours.replica_id)
    theirs.ask_for("b", ours.replica_id)
    theirs.ask_for("a", ours.replica_id)
    heard: list[str] = []
    until(lambda: heard.extend(ours.asked_for(1.0)) or {"a", "b"} <= set(heard))
    assert theirs.asked_for(0.0) == []


def test_the_service_time_is_one_for_all_replicas(open_redis: Open):
    ours, theirs = open_redis(), open_redis()
    started_s = time.monotonic()
    first_s = ours.beat().service_time_s

    served = [replica.beat().service_time_s for _ in range(20) for replica in (ours, theirs)]

    assert served == sorted(served)
    assert served[-1] - first_s <= time.monotonic() - started_s


def test_time_without_any_replica_is_no_service(valkey: ValkeyServer, open_redis: Open):
    store = open_redis(lease_s=20.0)
    before_s = store.beat().service_time_s
    with valkey.client() as client:
        beat_us = int(client.hget("ntm:clock", "beat_us") or 0)  # type: ignore[arg-type]
        client.hset("ntm:clock", "beat_us", str(beat_us - 3600 * 10**6))

    after_s = store.beat().service_time_s

    assert after_s - before_s == pytest.approx(20.0)


def test_a_clock_that_is_set_back_takes_no_service_time_away(valkey: ValkeyServer, open_redis: Open):
    store = open_redis()
    before_s = store.beat().service_time_s
    with valkey.client() as client:
        client.hincrby("ntm:clock", "beat_us", 3600 * 10**6)

    assert store.beat().service_time_s == before_s


def test_scripts_that_the_server_has_forgotten_are_sent_again(valkey: ValkeyServer, open_redis: Open):
    store = open_redis()
    make(store, "a")
    with valkey.client() as client:
        client.script_flush()

    assert store.commit([message("a", 0)]) == [None]
    with valkey.client() as client:
        client.script_flush()
    assert first_steps(claim(store, "a")) == [0]


def test_everything_is_there_after_the_server_was_killed_and_started_again(
    start_valkey: StartValkey, open_redis: Open
):
    server = start_valkey(appendfsync="always")
    store = open_redis(server, sync="full", lease_s=60.0)
    make(store, "a", request_id="r", snapshot=b"state")
    for step in range(20):
        assert store.commit([message("a", step)]) == [None]

    server.kill()
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        store.commit([message("a", 20)])
    server.start()

    assert store.beat().service_time_s >= 0
    claimed = claim(store, "a")
    assert claimed.snapshot == b"state"
    assert first_steps(claimed) == list(range(20))
    assert store.commit([message("a", 20, fence=claimed.fence)]) == [None]


def test_a_commit_of_unknown_fate_does_not_land_after_the_session_was_claimed_anew(
    start_valkey: StartValkey, open_redis: Open
):
    server = start_valkey()
    store = open_redis(server, timeout_s=0.2)
    make(store, "a")

    server.pause()
    started_s = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="repeat the call"):
        store.commit([message("a", 0)])
    assert time.monotonic() - started_s < 2
    server.resume()

    claimed = claim(store, "a")
    assert store.commit([message("a", 0)]) == [Fenced()]
    assert store.look("a") == claimed.entry
    assert first_steps(claim(store, "a")) == first_steps(claimed)


def test_every_method_says_that_the_server_cannot_be_reached(start_valkey: StartValkey, open_redis: Open):
    server = start_valkey()
    store = open_redis(server)
    store.asked_for(0.0)
    server.kill()

    calls: list[Callable[[], object]] = [
        lambda: store.commit([message("a", 0)]),
        lambda: store.claim(["a"]),
        lambda: store.look("a"),
        lambda: store.find_request("r"),
        lambda: store.page("", 1, ""),
        lambda: store.find_idle(1.0, 1),
        lambda: store.purge(1.0),
        store.beat,
        lambda: store.release("a"),
        lambda: store.ask_for("a", "b"),
        lambda: store.asked_for(5.0),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailableError):
            call()
    store.close()
    with pytest.raises(StoreUnavailableError):
        open_redis(server)

    server.start()
    assert open_redis(server).asked_for(0.0) == []


def test_a_replica_hears_again_once_the_server_is_back(start_valkey: StartValkey, open_redis: Open):
    server = start_valkey()
    ours = open_redis(server)
    ours.asked_for(0.0)
    server.kill()
    with pytest.raises(StoreUnavailableError):
        ours.asked_for(1.0)
    server.start()
    ours.asked_for(0.0)

    open_redis(server).ask_for("a", ours.replica_id)

    assert ours.asked_for(5.0) == ["a"]


def fill(store: RedisStore, session_id: str) -> int:
    """Write until there is no room; returns how many messages there was room for."""
    for step in range(10_000):
        record = Record(step, os.urandom(20_000))
        (result,) = store.commit([Write(session_id, 1, step + 1, 0.0, record=record)])
        if result is not None:
            assert isinstance(result, StoreFullError)
            return step
    raise AssertionError("there is room without end")


def test_a_full_store_says_so_changes_nothing_and_lets_sessions_end(
    start_valkey: StartValkey, open_redis: Open
):
    server = start_valkey(maxmemory="12mb")
    store = open_redis(server)
    make(store, "a", "b", "c")
    room = fill(store, "a")

    large = message("b", 0, snapshot=bytes(1_000_000))
    (full, also_full, ended) = store.commit([large, creation("new"), ending("c")])

    assert isinstance(full, StoreFullError)
    assert isinstance(also_full, StoreFullError)
    assert ended is None
    assert store.look("b") == entry("b")
    assert store.look("new") is None
    store.beat()
    claimed = claim(store, "a")
    assert first_steps(claimed) == list(range(room))
    assert store.commit([ending("a", room, fence=claimed.fence)]) == [None]
    until(lambda: store.commit([message("b", 0)]) == [None])  # the server frees memory beside its work


def test_a_server_starts_on_a_full_store(start_valkey: StartValkey, open_redis: Open):
    server = start_valkey(maxmemory="12mb")
    store = open_redis(server)
    make(store, "a")
    room = fill(store, "a")
    store.close()

    again = open_redis(server)

    assert claim(again, "a").entry.next_step == room


def test_a_damaged_key_is_told_from_a_failing_server(valkey: ValkeyServer, open_redis: Open):
    store = open_redis()
    make(store, "a")
    store.release("a")
    with valkey.client() as client:
        client.set("ntm:records:a", "no list")

    with pytest.raises(StoreCorruptError, match="ntm:"):
        store.claim(["a"])


def test_durability_is_what_the_servers_settings_make_it(start_valkey: StartValkey, open_redis: Open):
    assert open_redis(start_valkey(appendfsync="always")).durability == Durability.POWER
    assert open_redis(start_valkey(appendfsync="everysec")).durability == Durability.PROCESS
    assert open_redis(start_valkey(appendonly="no", appendfsync="always")).durability == Durability.PROCESS


@pytest.mark.parametrize(
    "config", [{"appendfsync": "everysec"}, {"appendonly": "no", "appendfsync": "always"}]
)
def test_full_sync_is_refused_by_a_server_that_answers_before_it_has_written(
    start_valkey: StartValkey, open_redis: Open, config: dict[str, str]
):
    with pytest.raises(StoreSettingsError, match=r"set them to yes and always, or start with --sync normal"):
        open_redis(start_valkey(**config), sync="full")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_throws_keys_away_is_refused(start_valkey: StartValkey, open_redis: Open, policy: str):
    with pytest.raises(StoreSettingsError, match=f"maxmemory-policy {policy}.*set it to noeviction"):
        open_redis(start_valkey(maxmemory_policy=policy))


def test_a_cluster_is_refused(start_valkey: StartValkey, open_redis: Open):
    with pytest.raises(StoreSettingsError, match="one server"):
        open_redis(start_valkey(cluster_enabled="yes", cluster_port=str(free_port())))


def test_a_user_who_may_not_read_settings_gets_what_can_be_promised(valkey: ValkeyServer, open_redis: Open):
    with valkey.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "app", "on", ">secret", "~ntm:*", "&ntm:*", "+@all", "-config"
        )  # type: ignore[no-untyped-call]
    url = valkey.url.replace("//", "//app:secret@")

    store = open_redis(url=url)

    assert store.durability == Durability.PROCESS
    make(store, "a", request_id="r", snapshot=b"state")
    assert store.commit([message("a", 0)]) == [None]
    assert first_steps(claim(store, "a")) == [0]
    assert store.asked_for(0.0) == []
    with pytest.raises(StoreSettingsError, match="allow this user CONFIG GET, or start with --sync normal"):
        open_redis(url=url, sync="full")


def test_a_wrong_password_is_refused_and_not_repeated(
    start_valkey: StartValkey, open_redis: Open, tmp_path: Path
):
    server = start_valkey(requirepass="right")
    wrong = server.url.replace("//", "//:wr0ng@")

    with pytest.raises(StoreSettingsError, match="put a user and password") as refused:
        open_redis(url=wrong)
    assert "wr0ng" not in str(refused.value)
    with pytest.raises(StoreSettingsError, match="put a user and password"):
        open_redis(server)

    (tmp_path / "password").write_text("right\n")
    make(open_redis(url=f"{server.url}?password_file={tmp_path / 'password'}"), "a")
    with pytest.raises(StoreSettingsError, match=r"cannot be read from .*/nowhere"):
        open_redis(url=f"{server.url}?password_file={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    "url",
    ["redis://host:port/0", "redis://:se/cret@host:1/0", "redis:///0", "redis://host:1/0?socket_timeout=x"],
)
def test_a_url_that_is_not_understood_is_refused_without_its_password(open_redis: Open, url: str):
    with pytest.raises(StoreSettingsError, match=r"is not understood.*redis://HOST:PORT/DB") as refused:
        open_redis(url=url)

    assert "cret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_an_option_that_is_not_known_is_refused(open_redis: Open):
    with pytest.raises(StoreSettingsError, match=r"nonsense.*leave it out"):
        open_redis(url="redis://host:1/0?nonsense=1")


def test_the_layout_of_another_version_is_refused(valkey: ValkeyServer, open_redis: Open):
    open_redis()
    with valkey.client() as client:
        client.set("ntm:schema", "99")

    with pytest.raises(StoreSettingsError, match="schema 99, this one knows 1"):
        open_redis()


def test_databases_of_one_server_are_apart(valkey: ValkeyServer, open_redis: Open):
    make(open_redis(), "a")
    other = open_redis(url=valkey.url.removesuffix("/0") + "/1")

    assert other.look("a") is None
    assert other.claim(["a"]) == [None]


def test_a_session_moves_between_replicas_without_losing_a_message(open_redis: Open):
    replicas = [open_redis(), open_redis()]
    make(replicas[0], "a", releases=True)

    for step in range(10):
        store = replicas[step % 2]
        claimed = claim(store, "a")
        assert claimed.fence == step + 2
        assert first_steps(claimed) == list(range(step))
        assert store.commit([message("a", step, fence=claimed.fence, releases=True)]) == [None]

    assert isinstance(replicas[0].look("a"), Entry)
