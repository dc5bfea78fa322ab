"""Session: what the server knows of one session while it is in memory.

Data only. What every batch asks of it stands in its model's table (`table.py`) and is shown here as its own.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from server.errors import ServingError, SessionMovedError
from server.runtime.runner import INITIAL_SLOT
from server.storage.codec import SessionMetadata
from server.storage.interface import Entry as StoreEntry

if TYPE_CHECKING:
    from server.sessions.request import Entry
    from server.sessions.served_model import ServedModel


class Session:
    """A scratch memory, its counter, and the queue of what is to be done with it."""

    __slots__ = (
        "_metadata",
        "fence",
        "index",
        "is_leaving",
        "is_ready",
        "loss",
        "model",
        "request_id",
        "session_id",
        "table",
        "waiting",
    )

    def __init__(
        self,
        session_id: str,
        request_id: str,
        model: ServedModel,
        index: int,
        metadata: SessionMetadata,
        fence: int,
        next_step: int,
        last_use_s: float,
        slot: int = INITIAL_SLOT,
    ) -> None:
        """A session with nothing in its retry window.

        Args:
            session_id: its id.
            request_id: of the request that made it.
            model: its model.
            index: its index in the model's table, taken for it.
            metadata: what its store entry says.
            fence: under which this replica may write it.
            next_step: its counter.
            last_use_s: service time of its last call.
            slot: where its state is, held for it.
        """
        self.model = model
        self.table = model.table
        self.index = index
        self.session_id = session_id
        self.request_id = request_id
        self.fence = fence
        self.table.num_failed += metadata.failure is not None
        self._metadata = metadata
        self.metadata = metadata
        self.slot = slot
        self.last_use_s = last_use_s
        self.waiting: deque[Entry] | None = None
        """Entries of its queue behind the first, in order of arrival."""
        self.is_ready = True
        """Its state is in its slot. Until then its queue waits."""
        self.is_leaving = False
        """The last entry of its queue gives it to another replica; no more may enter."""
        self.loss: ServingError | None = None
        """Why it is in memory no more: what everything that is still in its queue is told."""
        self.table.session[index] = self
        self.table.retry_windows.begin(index, next_step, metadata.reset_steps)

    @property
    def metadata(self) -> SessionMetadata:
        """What its store entry says of it."""
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: SessionMetadata) -> None:
        table, index = self.table, self.index
        table.num_failed += (metadata.failure is not None) - (self._metadata.failure is not None)
        self._metadata = metadata
        table.snapshot_step.one[index] = metadata.snapshot_step
        table.is_approximate.one[index] = metadata.is_approximate

    @property
    def next_step(self) -> int:
        """Index of the next step."""
        return self.table.next_step.one[self.index]

    @property
    def slot(self) -> int:
        """Where its state is."""
        return self.table.slot.one[self.index]

    @slot.setter
    def slot(self, slot: int) -> None:
        self.table.slot.one[self.index] = slot

    @property
    def initial_slot(self) -> int:
        """Where the state is that it began from and a reset returns to; held for it."""
        return self.table.initial_slot.one[self.index]

    @initial_slot.setter
    def initial_slot(self, slot: int) -> None:
        self.table.initial_slot.one[self.index] = slot

    def move_to(self, slot: int) -> None:
        """Let its state be in another slot, and release the one it was in."""
        self.model.slots.release(self.slot)
        self.slot = slot

    @property
    def last_use_s(self) -> float:
        """Service time of its last call."""
        return self.table.last_use_s.one[self.index]

    @last_use_s.setter
    def last_use_s(self, last_use_s: float) -> None:
        self.table.last_use_s.one[self.index] = last_use_s

    @property
    def has_just_failed(self) -> bool:
        """Whether the last request failed, so that a repeat of it is answered without running it."""
        failure = self._metadata.failure
        return failure is not None and failure.first_step == self.next_step

    def check_may_enter(self) -> None:
        """That something may still be enqueued.

        Raises:
            SessionMovedError, or what else became of the session.
        """
        if self.loss:
            raise self.loss
        if self.is_leaving:
            raise SessionMovedError(self.session_id)

    # Its queue.

    @property
    def head(self) -> Entry | None:
        """The entry of its queue that is being done, or is next."""
        return self.table.head[self.index]

    @property
    def last_entry(self) -> Entry | None:
        """The entry of its queue that whatever comes now waits for."""
        return self.waiting[-1] if self.waiting else self.head

    def enqueue(self, entry: Entry) -> bool:
        """Put an entry at the end of its queue; says whether it is the first."""
        table, index = self.table, self.index
        table.is_idle.one[index] = False
        if table.head[index] is None:
            table.head[index] = entry
            return True
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append(entry)
        table.needs_attention.one[index] = True
        return False

    def dequeue(self, entry: Entry) -> None:
        """Take an entry out of its queue, wherever it stands."""
        table, index, waiting = self.table, self.index, self.waiting
        if entry is not table.head[index]:
            assert waiting is not None
            waiting.remove(entry)
        else:
            table.head[index] = waiting.popleft() if waiting else None
        if waiting is not None and not waiting and self.loss is None:
            table.needs_attention.one[index] = False

    def replace_head(self, entry: Entry) -> None:
        """Put an entry in the place of the first."""
        self.table.head[self.index] = entry

    # Its end in memory.

    def give_up_index(self) -> None:
        """It is lost, and nothing uses its state or its retry window any more."""
        table, index = self.table, self.index
        if index != table.no_index:
            self.index = table.no_index
            table.num_failed -= self._metadata.failure is not None
            table.num_lost -= 1
            self.model.slots.release(table.slot.one[index])
            self.model.slots.release(table.initial_slot.one[index])
            table.retry_windows.end(index)
            table.give_up(index)

    def entry(
        self,
        metadata: SessionMetadata,
        next_step: int,
        last_use_s: float,
        end_time_s: float | None = None,
    ) -> StoreEntry:
        """What the store is to keep of it."""
        return StoreEntry(
            self.session_id,
            self.model.model.name,
            self.request_id,
            next_step,
            last_use_s,
            metadata.encode(),
            end_time_s,
        )
