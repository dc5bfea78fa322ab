"""Lines: one session's calls, in order of arrival, one at a time, and changes that are committed before they are made.

What a call does is its own: `steps.py` and `sessions.py` say how it begins, and end it. If it cannot be known what
became of a commit, the session is lost to this server's memory: its calls are told so, and the next one finds it as the
store has it.

Everything here runs in the event loop's thread; the engine's and the store's threads only hand back what has ended.
`residence.py` looks after sessions that come and go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Protocol

import numpy as np

from server.errors import (
    LeaseLapsedError,
    QueueFullError,
    ServingError,
    SessionMovedError,
)
from server.runtime.runner import Rows
from server.sessions.served_model import ServedModel
from server.sessions.session import Batch, Call, CallsTogether, Company, Group, Session
from server.sessions.watching import Watching
from server.storage.codec import About
from server.storage.commit_writer import CommitWriter, Outcome
from server.storage.interface import Write


class Keeper(Protocol):
    """Who looks after sessions: `residence.py`."""

    def rest(self, served: ServedModel, places: int | Rows) -> None:
        """No call is left in the lines of the sessions in some places, or one, of a model's room."""

    def vacate(self, session: Session) -> None:
        """A session is lost, and nothing uses its slot any more."""

    def lost(self, session: Session) -> None:
        """A session is lost: whoever looks for it must look in the store."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of one session once the store has it."""

    session: Session
    write: Write
    apply: Callable[[], None]
    undo: Callable[[], None] = lambda: None


class Lines:
    """Serves the calls of all sessions."""

    def __init__(self, journal: CommitWriter) -> None:
        """Commit to a journal."""
        self._journal = journal
        self.keeper: Keeper
        self.watching = Watching()

    # Entering and leaving.

    def enter(
        self,
        session: Session,
        begin: Callable[[Call], None],
        needs_device: bool = False,
        follows: Call | None = None,
        batch: tuple[Batch, int] | None = None,
        is_our_own: bool = False,
    ) -> Call:
        """Put a call in its session's line.

        A call that neither needs the device nor has to wait for another is never too many, nor is one of our own.

        Raises:
            QueueFullError; SessionMovedError or what else became of the session.
        """
        self._check_is_here(session)
        served = session.model
        must_wait = needs_device or session.first_call is not None
        if must_wait and not is_our_own and served.num_pending >= served.limits.max_pending_messages:
            raise queue_full(served)
        served.num_pending += 1
        if batch is None:
            future: asyncio.Future[Any] = served.loop.create_future()
            call = Call(session, begin, future, partial(_settle, future), follows)
        else:
            call = batch[0].call(session, begin, batch[1])
        served.room.is_idle.one[session.place] = False
        if session.line_up(call):
            self.serve(session)
        return call

    def enter_group(self, group: Group) -> None:
        """Put a group in the lines of its sessions; whoever enters it has counted it among the pending."""
        group.batch.calls.append(group)
        room = group.served.room
        if room.is_idle.each[group.places].all():
            for place in group.places.tolist():
                room.first_call[place] = group
        else:
            group.waiting.update([session for session in group.sessions if not session.line_up(group)])
        room.is_idle.each[group.places] = False
        if not group.waiting:
            group.begin(group)

    async def finish(self, waiting: Call | Batch) -> Any:
        """What became of a call, or of each of a batch; whoever is cancelled here withdraws what has not begun.

        Raises:
            What the call raises.
        """
        try:
            return await waiting.future
        except asyncio.CancelledError:
            self.withdraw([waiting] if isinstance(waiting, Call) else waiting.calls)
            raise

    def withdraw(self, calls: Iterable[Call | Group]) -> None:
        """The caller has left: take the calls out that have not begun; the others run to their end."""
        for call in calls:
            if isinstance(call, Group):
                self._withdraw_group(call)
                continue
            if not call.future.cancel() and not call.future.cancelled():
                call.future.exception()  # nobody else will ask, and asyncio would complain
            self._withdraw(call)

    # Serving.

    def serve(self, session: Session) -> None:
        """Begin what can be begun; to be called whenever a session's line or what it waits for has changed."""
        while (call := session.first_call) is not None and (session.is_ready or session.loss):
            if isinstance(call, Group):
                if call.message is not None:
                    return
                if session.loss:
                    self._drop(call, session, session.loss)
                    continue
                call.waiting.discard(session)
                if not call.waiting:
                    call.begin(call)
                return
            if call.is_begun:
                return
            if call.future.cancelled() or (call.follows is not None and call.follows.has_failed):
                call.has_failed = True
                self._leave(call)
                continue
            if session.loss:
                self.fail(call, session.loss)
                continue
            call.is_begun = True
            try:
                call.begin(call)
            except Exception as error:  # a bug in one call must not keep the others of its session waiting
                self.fail(call, error)
        if call is None and session.is_ready:
            if session.loss:
                self.keeper.vacate(session)
            else:
                self.keeper.rest(session.model, session.place)

    def end(self, call: Call, result: object) -> None:
        """Answer the call being served, unless what this replica knows may be out of date."""
        if not self._journal.holds_lease:
            return self.fail(call, LeaseLapsedError())
        self._leave(call)
        return call.settle(result)

    def fail(self, call: Call, error: BaseException) -> None:
        """Answer the call being served with an error."""
        call.has_failed = True
        self._leave(call)
        call.settle(error)

    def end_calls(self, company: CallsTogether, results: Sequence[object]) -> None:
        """Answer calls that were served together, each with a result or an exception, as `end` and `fail` do one.

        What stands behind them begins first: if it has to run, it goes to the engine before their answers are written.
        """
        if not self._journal.holds_lease:
            results = [
                result if isinstance(result, BaseException) else LeaseLapsedError() for result in results
            ]
        for call, result in zip(company.calls, results, strict=True):
            call.has_failed = isinstance(result, BaseException)
            _let_go(call)
        try:
            # Only now, since whose turn it is next sees what has become of those before.
            self._leave_together(company, company.calls)
        finally:
            for call, result in zip(company.calls, results, strict=True):
                call.settle(result)

    def lose(self, session: Session, loss: ServingError) -> None:
        """A session is here no more; what is in its line is told why, but what has begun in the engine ends there."""
        if session.loss is None:
            session.loss = loss
            room = session.model.room
            room.needs_care.one[session.place], room.is_idle.one[session.place] = True, False
            room.num_lost += 1
            self.keeper.lost(session)
            if self.watching.of:
                self.watching.end(session.session_id, loss)

    def commit(self, changes: Sequence[Change], then: Callable[[list[ServingError | None]], None]) -> None:
        """Commit changes, then make them part of their sessions; `then` is told what became of each.

        A session whose change was not committed is lost.
        """

        def committed(outcomes: list[Outcome]) -> None:
            errors: list[ServingError | None] = []
            for change, outcome in zip(changes, outcomes, strict=True):
                session = change.session
                if outcome is not None:
                    self.lose(session, loss_by(outcome, session.session_id))
                errors.append(session.loss)
                if session.loss:
                    change.undo()
                else:
                    change.apply()
            then(errors)

        self._journal.commit([change.write for change in changes], committed)

    def change(
        self,
        session: Session,
        about: About,
        apply: Callable[[], None] = lambda: None,
        snapshot: bytes | None = None,
        end_time_s: float | None = None,
        releases: bool = False,
        last_use_s: float | None = None,
    ) -> Change:
        """A change of a session that runs no step; by default it counts as a use."""
        if last_use_s is None:
            last_use_s = self._journal.service_time_s

        def apply_all() -> None:
            session.about, session.last_use_s = about, last_use_s
            apply()

        write = Write(
            session.session_id,
            session.fence,
            session.next_step,
            last_use_s,
            entry=session.entry(about, session.next_step, last_use_s, end_time_s),
            snapshot=snapshot,
            forget_before=None
            if snapshot is None
            else max(0, session.next_step - session.model.limits.retry_window_steps),
            releases=releases,
        )
        return Change(session, write, apply_all)

    # Leaving.

    def end_group(self, group: Group) -> None:
        """The message of a group has ended or is withdrawn: it is the turn of who waits behind it."""
        self._leave_together(group, repeat(group, len(group.sessions)))

    def _leave_together(self, company: Company, calls: Iterable[Call | Group]) -> None:
        """Take sessions that were served together out of line, each with its call, and begin what stands behind."""
        served, places = company.served, company.places
        served.num_pending -= len(places)
        served.room.last_use_s.each[places] = self._journal.service_time_s
        if not served.room.needs_care.each[places].any():
            for place in places.tolist():
                served.room.first_call[place] = None
            return self.keeper.rest(served, places)
        for session, call in zip(company.sessions, calls, strict=True):
            session.leave_line(call)
            self.serve(session)
        return None

    def _drop(self, group: Group, session: Session, error: ServingError) -> None:
        """Take a session that is lost out of a group that has not begun."""
        row = group.sessions.index(session)
        index = int(group.indices[row])
        session.leave_line(group)
        group.served.num_pending -= 1
        group.waiting.discard(session)
        group.keep([other for other in range(len(group.sessions)) if other != row])
        if not group.sessions:
            group.batch.calls.remove(group)
        group.batch.settle_error(index, error)
        if group.sessions and not group.waiting:
            group.begin(group)

    def _leave(self, call: Call) -> None:
        session = call.session
        session.leave_line(call)
        _let_go(call)
        session.last_use_s = self._journal.service_time_s
        session.model.num_pending -= 1

    def _withdraw(self, call: Call) -> None:
        session = call.session
        if call not in session.calls:
            return
        if not call.is_begun:
            session.leave_line(call)
            session.model.num_pending -= 1
            self.serve(session)
        elif (message := call.message) is not None:  # else it has yet to get one, unless it is cancelled
            company = call.company
            row = company.sessions.index(session) if company else 0
            slot = int(message.write_slots[row])
            if session.model.withdraw(message, row):
                session.model.slots.release(slot)
                if company:
                    company.keep([other for other in range(len(company.sessions)) if other != row])
                self._leave(call)
                self.serve(session)

    def _withdraw_group(self, group: Group) -> None:
        if group.message is None:
            behind = [session for session in group.sessions if session.first_call is group]
            group.served.num_pending -= len(group.sessions)
            for session in group.sessions:
                session.leave_line(group)
            for session in behind:
                self.serve(session)
        elif not group.message.has_ended and group.served.withdraw(group.message):
            group.served.slots.release_many(np.asarray(group.message.write_slots))
            self.end_group(group)

    def _check_is_here(self, session: Session) -> None:
        if session.loss:
            raise session.loss
        if session.is_leaving:
            raise SessionMovedError(session.session_id)


def _let_go(call: Call) -> None:
    """A call that has left its line is to keep nothing alive, however long its caller keeps it."""
    call.follows = call.message = call.company = None


def move(session: Session, slot: int) -> None:
    """Let a session's state be in another slot."""
    session.model.slots.release(session.slot)
    session.slot = slot


def loss_by(outcome: Outcome, session_id: str) -> ServingError:
    """What callers are told of a change that was not committed."""
    return outcome if isinstance(outcome, ServingError) else SessionMovedError(session_id)


def queue_full(served: ServedModel) -> QueueFullError:
    """Too many messages wait for a model."""
    return QueueFullError(served.model.label, served.limits.max_pending_messages)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
