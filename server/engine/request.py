"""Request: T steps of S sessions on their way through the engine, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from ntm.tensor import Array
from server.errors import ServingError
from server.runtime.runner import Rows


@dataclass(eq=False, slots=True)
class Message:
    """T steps of S sessions, T at least 0, and a look at the state after them if asked for."""

    session_ids: Sequence[str]
    first_steps: Sequence[int] | Rows
    inputs: Array
    """[S, T, ...input shape]."""
    outputs: Array
    """[S, T, ...output shape], filled turn by turn."""
    slots: Sequence[int] | Rows
    """Where each state is at first: the session's slot."""
    write_slots: Sequence[int] | Rows
    """Where each state goes in the end, and whenever the message must wait for its next turn."""
    shared_slots: frozenset[int] = frozenset()
    """Those of `slots` that somebody else holds as well, and will need when this message has ended."""
    load_state: dict[str, Array] | None = None
    """By name, [S, ...state shape] each: what is to be put into `slots` before the first turn."""
    wants_state: bool = False
    on_ended: Callable[[Message], None] | None = None
    """What whoever submitted it wants done then; the engine only carries it."""
    state: dict[str, Array] | None = None
    """After the last step, by name, [S, ...state shape] each, if it was asked for."""
    errors: dict[int, ServingError] = field(default_factory=dict)
    """By index, of the sessions whose steps failed."""
    steps_done: int = 0
    num_left: int = field(init=False)
    """Steps that are not done."""
    num_rows: int = field(init=False)
    """S."""
    is_started: bool = False
    has_ended: bool = False
    """All its turns are done, or every session has failed."""
    submit_time_s: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        """Nothing is done."""
        self.num_rows, self.num_left = self.inputs.shape[:2]

    @property
    def present_slots(self) -> Sequence[int] | Rows:
        """Whose the state of each session is by now; `lodgers.py` knows where it is."""
        return self.write_slots if self.steps_done else self.slots

    def leave_out(self, row: int) -> None:
        """Go without one of several sessions, before the first turn; for messages that bring no state along."""
        rows = [other for other in range(self.num_rows) if other != row]
        self.session_ids = [self.session_ids[other] for other in rows]
        self.first_steps = np.asarray(self.first_steps)[rows]
        self.inputs, self.outputs = self.inputs[rows], self.outputs[rows]
        self.slots, self.write_slots = np.asarray(self.slots)[rows], np.asarray(self.write_slots)[rows]
        self.num_rows -= 1

    def go_on(self, num_steps: int) -> None:
        """So many more steps are done."""
        self.steps_done += num_steps
        self.num_left -= num_steps

    def fail(self, row: int, error: ServingError) -> None:
        """One session gets no result; its first error counts."""
        self.errors.setdefault(row, error)
        self.has_ended = len(self.errors) == self.num_rows
