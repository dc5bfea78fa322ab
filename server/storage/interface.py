"""Store: what of a session outlives the process, and who may write it.

One small interface for every kind of store; `none.py`, `sqlite.py` and `redis.py` implement it, and one suite of tests
runs against all. A store keeps, for each session, an entry, a snapshot and the records since, and knows who owns it. It
looks into none of them: `server/records.py` says what they hold and notices when they are damaged.

Every method may block and is called from threads of the server, never from the event loop; methods may be called
from several threads at once.

Time is the store's service time: seconds during which some replica was up, so that downtime makes no session idle.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from server.errors import StoreError


class Durability(Enum):
    """How long what was committed lasts."""

    VOLATILE = "volatile"
    """As long as the process."""
    PROCESS = "process"
    """It survives the server's death; a power failure may undo the last commits."""
    POWER = "power"
    """It survives a power failure."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a store keeps of a session beside its snapshot and records."""

    session_id: str
    model_name: str
    """Fixed when the session is made, as `request_id` is: later writes repeat them."""
    request_id: str
    """Names the request that made the session, so that a repeat finds it; "" if it has no name."""
    next_step: int
    last_use_s: float
    """Service time of the last call that used it."""
    content: bytes
    """Whatever else there is to say of it; a store does not look inside."""
    end_time_s: float | None = None
    """Seconds since the epoch, by the store's clock, when the session ended; None while it lives."""


@dataclass(frozen=True, slots=True)
class Record:
    """One message of a session, as it was applied."""

    first_step: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Write:
    """One change of one session: applied whole or not at all.

    The hot path, a message that was applied, is a `record` with a new `next_step` and `last_use_s`; everything else
    is None then.
    """

    session_id: str
    fence: int
    """From the claim, or from the write that made the session; NEW for one that makes it."""
    next_step: int
    last_use_s: float
    record: Record | None = None
    """One more record."""
    entry: Entry | None = None
    """The whole entry, where more has changed than step and use; needed for a new session and for one that ends. An
    entry with an `end_time_s` ends the session: its snapshot and records go, its id and request id stay until `purge`;
    the store puts its own clock's time in the place of that `end_time_s`."""
    snapshot: bytes | None = None
    """In the place of the snapshot so far; b"" for none (the model's initial state)."""
    forget_before: int | None = None
    """Records that end at or before this step are no longer needed: all but the last of those that begin at or before
    it may go."""
    releases: bool = False
    """Nobody owns the session afterwards."""


NEW = -1
"""The fence of a write that makes a session."""
FIRST_FENCE = 1
"""The fence under which whoever made a session owns it, unless the write released it."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """A write was not made: another replica owns the session, it was claimed again since, or it has ended."""


@dataclass(frozen=True, slots=True)
class EntryExists:
    """A write was not made: the id of a new session is known already."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class RequestExists:
    """A write was not made: the request that makes the session has made one already."""

    entry: Entry


Refusal = Fenced | EntryExists | RequestExists


@dataclass(frozen=True, slots=True)
class Claim:
    """A session that this replica owns from now on."""

    entry: Entry
    fence: int
    """Greater than every earlier one of this session where several replicas can write; writes with a lower one are
    refused."""
    snapshot: bytes
    """b"" if there is none: the model's initial state, as of the step that the entry's content says."""
    records: list[Record]
    """In order of step."""
    is_from_dead: bool = False
    """Another replica owned it, whose lease had run out."""


@dataclass(frozen=True, slots=True)
class OwnedElsewhere:
    """A session that another replica owns, whose lease has not run out."""

    entry: Entry
    owner: str
    lease_left_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat tells."""

    service_time_s: float
    time_s: float
    """Seconds since the epoch, by the store's clock."""
    lease_valid_until_s: float
    """By this machine's `time.monotonic()`, counted from before the renewal was sent; infinity where the store can
    have no other replica. Until then nobody takes this replica's sessions over."""


def new_replica_id() -> str:
    """Names this machine and one opening of a store."""
    return f"{socket.gethostname()}-{secrets.token_hex(6)}"


class Store(Protocol):
    """Where sessions are kept.

    Every method raises StoreUnavailableError when the store cannot be reached or its answer did not come in time
    (the fate of a commit is then unknown), StoreFullError when it has no room (nothing was changed), and
    StoreCorruptError when it cannot be read.
    """

    kind: str
    """"none", "sqlite" or "redis"."""
    durability: Durability
    """Read back from the store, not what was asked for."""
    keeps_steps: bool
    """False: records and snapshots are not kept, so a session lives only as long as it is in memory."""
    is_shared: bool
    """Whether other replicas can own sessions of this store."""
    replica_id: str
    """Names this replica, and this opening of the store by it, in its sessions' ownership."""

    def commit(self, writes: Sequence[Write]) -> list[Refusal | StoreError | None]:
        """Make writes, of different sessions, as durable as the store is; for each None, or why it was not made.

        A new session whose request is known is RequestExists, even where its id exists as well.

        Raises:
            StoreError: nothing is known of any of them.
        """

    def claim(self, session_ids: Sequence[str]) -> list[Claim | OwnedElsewhere | Entry | None]:
        """Own sessions, as nobody does, or nobody who lives, or this replica already; each claim has a new fence.

        Returns:
            For each: the claim; who else owns it; its entry if it has ended; None if it is not known.

        Raises:
            LeaseLapsedError: this replica's lease has run out.
        """

    def look(self, session_id: str) -> Entry | None:
        """A session's entry, ended or not, whoever owns it."""

    def find_request(self, request_id: str) -> Entry | None:
        """The entry of the session that a request made."""

    def page(self, after: str, size: int, model_name: str) -> list[Entry]:
        """Up to `size` living sessions with ids after `after`, ascending by byte; of one model, or of all for ""."""

    def count(self, first: str, before: str, model_name: str) -> int:
        """How many living sessions have ids from `first` on and before `before`, of one model, or of all for ""."""

    def find_idle(self, last_use_before_s: float, size: int) -> list[str]:
        """Ids of up to `size` living sessions last used before a service time, the longest unused first.

        Without those that another live replica owns.
        """

    def time_of_ended(self, number: int) -> float:
        """When the session ended (seconds since the epoch) after which `number` others have; -inf if there is none."""

    def purge(self, ended_before_s: float) -> int:
        """Forget sessions that ended before a time (seconds since the epoch); returns how many."""

    def beat(self) -> Beat:
        """Say that this replica is up: renews its lease and moves the service time on.

        Raises:
            LeaseLapsedError: the lease had run out before, so that others may have taken its sessions over; open
                the store anew.
        """

    def release(self, session_id: str) -> None:
        """Give up a session that this replica owns and has nothing of; does nothing if it does not own it."""

    def ask_for(self, session_id: str, owner: str) -> None:
        """Ask the replica that owns a session to release it. It may be lost: ask again."""

    def asked_for(self, timeout_s: float) -> list[str]:
        """Ids of sessions that other replicas have asked this one for; waits for the first."""

    def close(self) -> None:
        """End this replica's lease and disconnect. Sessions that it still owns can be claimed at once."""
