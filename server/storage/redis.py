"""Sessions in Valkey or Redis, which several replicas share.

Each opening is a replica with a lease of its own, a key that runs out unless `beat` renews it. A session's hash names
its owner and its fence; every write is a script that first looks at the lease, the owner and the fence, so nothing
that comes late is applied. Nothing is sent twice: a command whose answer did not come has an unknown fate, and the
caller claims its sessions anew. One server with whatever replicas it has for standby; not Redis Cluster.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from server.errors import (
    LeaseLapsedError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreSettingsError,
    StoreUnavailableError,
)
from server.storage import redis_scripts
from server.storage.interface import (
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

log = structlog.get_logger(__name__)

_LEASE_MARGIN = 0.1
"""The part of a lease by which this replica stops believing in it early: clocks run at different speeds."""
_OLDEST_MAJOR_VERSION = 7  # the first with flags for scripts
_PURGE_SIZE = 500
_IDLE_LOOK_SIZE = 1000
"""How many sessions one script deals with, so that none holds the store up: about a millisecond each."""
_HEARING_SLICE_S = 0.5
"""How soon a thread that waits to be asked notices that the store was closed."""

Arg = str | bytes | int | float
Call = tuple[str, list[Arg]]  # a script and its ARGV


class RedisStore:
    """Sessions in one database of a server, under keys that begin with `ntm:`."""

    kind: str = "redis"
    keeps_steps: bool = True
    is_shared: bool = True

    def __init__(self, url: str, lease_s: float, sync: Literal["full", "normal"], timeout_s: float) -> None:
        """Connect, see that the server's settings keep what the store promises, and begin a lease.

        Args:
            url: redis://[USER:PASSWORD@]HOST:PORT/DB, or rediss:// for TLS; ?password_file=PATH reads the password.
            lease_s: how long this replica's sessions stay its own after its last beat.
            sync: "full" demands a server that writes every command through to disk before it answers.
            timeout_s: how long an answer may take.

        Raises:
            StoreSettingsError: the URL, the server's version or its settings.
            StoreUnavailableError: there is no answer.
        """
        self.replica_id: str = new_replica_id()
        self._lease_s = lease_s
        self._redis = _connect(url, timeout_s)
        self._asks: redis.client.PubSub | None = None
        self._asks_lock = threading.Lock()
        self._is_closed = False
        with _opening():
            _check_version(self._redis)
            self.durability: Durability = _check_settings(self._redis, sync)
            _check_schema(self._redis)
        self._beat(begins=True)

    def commit(self, writes: Sequence[Write]) -> list[Refusal | StoreError | None]:
        """See Store.commit: one round trip.

        All writes in one script take 1.3 ms for 64 messages of 2.2 KB; a script for each takes 2.2. Those that make
        room have a second one, which a full store lets through.
        """
        shares: dict[bool, list[Write]] = {False: [], True: []}
        for write in writes:
            shares[_grows(write)].append(write)
        scripts = {False: redis_scripts.WRITE_WHEN_FULL_TOO, True: redis_scripts.WRITE}
        sent = [grows for grows, share in shares.items() if share]
        replies = self._run([(scripts[grows], self._write_args(shares[grows])) for grows in sent])
        outcomes = {
            grows: iter(self._outcomes(reply, len(shares[grows])))
            for grows, reply in zip(sent, replies, strict=True)
        }
        return [next(outcomes[_grows(write)]) for write in writes]

    def _write_args(self, writes: Sequence[Write]) -> list[Arg]:
        args: list[Arg] = [self.replica_id]
        for write in writes:
            parts = ""
            values: list[Arg] = []
            if write.record is not None:
                parts += "r"
                values += (write.record.first_step, write.record.content)
            if write.entry is not None:
                parts += "e" if write.entry.end_time_s is None else "ex"
                values += (write.entry.model_name, write.entry.request_id, write.entry.content)
            if write.snapshot is not None:
                parts += "s"
                values.append(write.snapshot)
            if write.forget_before is not None:
                parts += "f"
                values.append(write.forget_before)
            if write.releases:
                parts += "o"
            args += (write.session_id, write.fence, write.next_step, write.last_use_s, parts)
            args += values
        return args

    def _outcomes(self, reply: Any, num_writes: int) -> list[Refusal | StoreError | None]:
        if isinstance(reply, StoreFullError):
            return [reply] * num_writes
        if isinstance(reply, Exception):
            raise reply
        if not reply:  # the lease has lapsed
            return [Fenced()] * num_writes
        return [None if outcome == 1 else Fenced() if outcome == 0 else _exists(outcome) for outcome in reply]

    def claim(self, session_ids: Sequence[str]) -> list[Claim | OwnedElsewhere | Entry | None]:
        """See Store.claim: one round trip."""
        replies = self._run(
            [(redis_scripts.CLAIM, [self.replica_id, session_id]) for session_id in session_ids]
        )
        return [_claimed(_answer(reply)) for reply in replies]

    def look(self, session_id: str) -> Entry | None:
        """See Store.look."""
        with _translated():
            values = self._redis.hmget(
                f"ntm:session:{session_id}", ["model", "request", "next", "use", "content", "end"]
            )
        return None if values[0] is None else _entry([session_id.encode(), *values])

    def find_request(self, request_id: str) -> Entry | None:
        """See Store.find_request."""
        with _translated():
            session_id: Any = self._redis.get(f"ntm:request:{request_id}") if request_id else None
        return None if session_id is None else self.look(session_id.decode())

    def page(self, after: str, size: int, model_name: str) -> list[Entry]:
        """See Store.page."""
        living = f"ntm:living:{model_name}" if model_name else "ntm:living"
        (reply,) = self._run([(redis_scripts.PAGE, [living, f"({after}" if after else "-", size])])
        return [_entry(values) for values in _answer(reply)]

    def count(self, first: str, before: str, model_name: str) -> int:
        """See Store.count."""
        living = f"ntm:living:{model_name}" if model_name else "ntm:living"
        with _translated():
            return int(self._redis.zlexcount(living, f"[{first}", f"({before}"))

    def find_idle(self, last_use_before_s: float, size: int) -> list[str]:
        """See Store.find_idle."""
        found: list[str] = []
        offset = 0
        while len(found) < size:
            args: list[Arg] = [self.replica_id, last_use_before_s, offset, max(size, _IDLE_LOOK_SIZE)]
            (reply,) = self._run([(redis_scripts.FIND_IDLE, args)])
            num_seen, ids = _answer(reply)
            if not num_seen:
                break
            offset += num_seen
            found += [session_id.decode() for session_id in ids]
        return found[:size]

    def time_of_ended(self, number: int) -> float:
        """See Store.time_of_ended."""
        with _translated():
            found: Any = self._redis.zrange("ntm:ended", number, number, desc=True, withscores=True)
        return float(found[0][1]) if found else -math.inf

    def purge(self, ended_before_s: float) -> int:
        """See Store.purge."""
        num_purged = 0
        while True:
            (reply,) = self._run([(redis_scripts.PURGE, [ended_before_s, _PURGE_SIZE])])
            num_now = int(_answer(reply))
            num_purged += num_now
            if num_now < _PURGE_SIZE:
                return num_purged

    def beat(self) -> Beat:
        """See Store.beat."""
        return self._beat(begins=False)

    def _beat(self, begins: bool) -> Beat:
        # A gap between beats that is longer than a lease was a time without any replica.
        args: list[Arg] = [
            self.replica_id,
            round(self._lease_s * 1e3),
            round(self._lease_s * 1e6),
            int(begins),
        ]
        asked_s = time.monotonic()
        (reply,) = self._run([(redis_scripts.BEAT, args)])
        answer = _answer(reply)
        if answer is None:
            raise LeaseLapsedError
        service_us, seconds, microseconds = map(int, answer)
        return Beat(
            service_us / 1e6, seconds + microseconds / 1e6, asked_s + self._lease_s * (1 - _LEASE_MARGIN)
        )

    def release(self, session_id: str) -> None:
        """See Store.release."""
        (reply,) = self._run([(redis_scripts.RELEASE, [self.replica_id, session_id])])
        _answer(reply)

    def ask_for(self, session_id: str, owner: str) -> None:
        """See Store.ask_for."""
        with _translated():
            self._redis.publish(f"ntm:asks:{owner}", session_id)

    def asked_for(self, timeout_s: float) -> list[str]:
        """See Store.asked_for."""
        with self._asks_lock, _translated():
            try:
                return self._hear(timeout_s)
            except RedisError:
                self._stop_hearing()
                raise

    def _hear(self, timeout_s: float) -> list[str]:
        if self._asks is None:
            self._asks = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
            self._asks.subscribe(f"ntm:asks:{self.replica_id}")
        asked: list[str] = []
        ends_s = time.monotonic() + timeout_s
        while not self._is_closed:
            left_s = max(0.0, ends_s - time.monotonic())
            message = self._asks.get_message(timeout=0.0 if asked else min(left_s, _HEARING_SLICE_S))
            if message is not None:
                asked.append(message["data"].decode())
            elif asked or left_s == 0.0:
                break
        return list(dict.fromkeys(asked))

    def _stop_hearing(self) -> None:
        if self._asks is not None:
            self._asks.close()
            self._asks = None

    def close(self) -> None:
        """See Store.close. A lease that cannot be ended runs out by itself."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._redis.delete(f"ntm:replica:{self.replica_id}")
        except RedisError as error:
            log.warning("the session store could not be told of the end of this replica", cause=str(error))
        with self._asks_lock:
            self._stop_hearing()
        self._redis.close()

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in one round trip; returns for each its reply, or the error it was refused with."""
        replies = self._send([("EVALSHA", _digest(script), 0, *args) for script, args in calls])
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if (
            unknown
        ):  # the server has started since, or was never sent it: nothing was done, and EVAL sends it along
            again = self._send([("EVAL", calls[index][0], 0, *calls[index][1]) for index in unknown])
            for index, reply in zip(unknown, again, strict=True):
                replies[index] = reply
        return [_translation(reply) if isinstance(reply, RedisError) else reply for reply in replies]

    def _send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        with _translated(), self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipeline.execute(raise_on_error=False))


_DIGESTS: dict[str, str] = {}


def _digest(script: str) -> str:
    if script not in _DIGESTS:
        _DIGESTS[script] = sha1(script.encode(), usedforsecurity=False).hexdigest()
    return _DIGESTS[script]


def _grows(write: Write) -> bool:
    """Whether a write takes room that it does not give back."""
    if write.entry is not None:
        return write.entry.end_time_s is None
    return write.fence == NEW or write.record is not None or bool(write.snapshot)


def _entry(values: Sequence[Any]) -> Entry:
    session_id, model_name, request_id, next_step, last_use_s, content, end_time_s = values
    return Entry(
        session_id.decode(),
        model_name.decode(),
        request_id.decode(),
        int(next_step),
        float(last_use_s),
        content,
        None if end_time_s is None else float(end_time_s),
    )


def _exists(outcome: Sequence[Any]) -> EntryExists | RequestExists:
    what, *values = outcome
    return RequestExists(_entry(values)) if what == b"request" else EntryExists(_entry(values))


def _claimed(answer: Sequence[Any]) -> Claim | OwnedElsewhere | Entry | None:
    match answer:
        case [b"claimed", values, fence, snapshot, records, is_from_dead]:
            steps_and_contents = zip(records[::2], records[1::2], strict=True)
            return Claim(
                _entry(values),
                fence,
                snapshot,
                [Record(int(step), content) for step, content in steps_and_contents],
                is_from_dead=bool(is_from_dead),
            )
        case [b"owned", values, owner, lease_left_ms]:
            return OwnedElsewhere(_entry(values), owner.decode(), lease_left_ms / 1e3)
        case [b"ended", values]:
            return _entry(values)
        case [b"unknown"]:
            return None
        case _:
            raise LeaseLapsedError


def _answer(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise _translation(error) from error


def _translation(error: RedisError) -> Exception:
    """A failure of the store as one of ours; a mistake in what we asked of it as it is."""
    if isinstance(error, OutOfMemoryError):
        return StoreFullError()
    if isinstance(error, (ConnectionError, TimeoutError)):
        return StoreUnavailableError(error)
    reply = str(error)
    if reply.startswith("WRONGTYPE"):
        return StoreCorruptError("a key that begins with ntm:")
    if isinstance(error, ResponseError) and not reply.startswith("ERR"):
        return StoreUnavailableError(
            error
        )  # MISCONF, READONLY, BUSY, NOPERM, MASTERDOWN, ...: not as things are
    return error


def _connect(url: str, timeout_s: float) -> redis.Redis:
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    password_file = options.pop("password_file", None)
    bare_url = parts._replace(query=urlencode(options)).geturl()
    try:
        if not parts.hostname:
            raise ValueError
        credentials = {} if password_file is None else {"password": Path(password_file).read_text().strip()}
        # A pool of connections, one for each thread that waits; and no retries, as commands may not come twice.
        connection = redis.Redis.from_url(
            bare_url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            **credentials,
        )
        connection.connection_pool.make_connection()  # names what it does not understand
    except OSError as error:
        raise StoreSettingsError(
            f"the password of the session store cannot be read from {password_file} ({error.strerror}): give "
            "?password_file= the path of a file that the server may read"
        ) from error
    except TypeError as error:
        raise StoreSettingsError(
            f"the session store's URL has an option that is not known ({error}): leave it out of --store"
        ) from error
    except ValueError:
        # Without the cause, which can quote the password.
        raise StoreSettingsError(
            "the session store's URL is not understood: give --store redis://HOST:PORT/DB, with signs like / and @ in "
            "a password as %2F and %40"
        ) from None
    return connection


@contextmanager
def _opening() -> Iterator[None]:
    """What the server refuses while the store is opened is a matter of settings; silence is not."""
    try:
        yield
    except (AuthenticationError, NoPermissionError) as error:
        raise StoreSettingsError(
            f"the session store does not let this server in ({error}): put a user and password that may use keys and "
            "channels that begin with ntm: into the URL, redis://USER:PASSWORD@HOST:PORT/DB"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise StoreUnavailableError(error) from error
    except ResponseError as error:
        raise StoreSettingsError(
            f"the session store cannot be used ({error}): give --store the URL of a primary Valkey or Redis server"
        ) from error


def _check_version(connection: redis.Redis) -> None:
    about = connection.info("server")
    version = str(about.get("valkey_version") or about["redis_version"])
    if int(version.split(".")[0]) < _OLDEST_MAJOR_VERSION:
        raise StoreSettingsError(
            f"the session store runs version {version}: use Valkey, or Redis from version {_OLDEST_MAJOR_VERSION} on"
        )
    if about.get("server_mode", about.get("redis_mode")) == "cluster":
        raise StoreSettingsError(
            "the session store is a cluster, and sessions need one server: start Valkey without cluster-enabled"
        )


def _check_settings(connection: redis.Redis, sync: Literal["full", "normal"]) -> Durability:
    try:
        settings = connection.config_get("maxmemory-policy", "appendonly", "appendfsync")
    except ResponseError as error:
        if sync == "full":
            raise StoreSettingsError(
                f"the session store does not tell its settings ({error}), so what it writes through to disk is not "
                "known: allow this user CONFIG GET, or start with --sync normal"
            ) from error
        log.warning(
            "the session store does not tell its settings: see that maxmemory-policy is noeviction",
            cause=str(error),
        )
        return Durability.PROCESS
    policy = settings["maxmemory-policy"]
    if policy != "noeviction":
        raise StoreSettingsError(
            f"the session store throws keys away when it is full (maxmemory-policy {policy}): set it to noeviction"
        )
    writes_through = settings["appendonly"] == "yes" and settings["appendfsync"] == "always"
    if sync == "full" and not writes_through:
        raise StoreSettingsError(
            "the session store answers before it has written to disk (appendonly "
            f"{settings['appendonly']}, appendfsync {settings['appendfsync']}): set them to yes and always, or start "
            "with --sync normal"
        )
    return Durability.POWER if writes_through else Durability.PROCESS


def _check_schema(connection: redis.Redis) -> None:
    """Ours to read; there is one version so far, so none to bring up to date."""
    known = redis_scripts.SCHEMA_VERSION
    version = int(connection.get("ntm:schema") or 0)
    if version == 0:
        connection.set("ntm:schema", known, nx=True)
    elif version != known:
        raise StoreSettingsError(
            f"the session store was written by another version of this server (schema {version}, this one knows "
            f"{known}): start that version, or give --store another database, redis://HOST:PORT/DB"
        )
