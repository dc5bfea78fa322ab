"""Request: T steps of S sessions of one model, as the engine sees them.

`sessions/request.py` adds what the engine does not look at: whose steps they are, and who waits for the answer.

Shapes: S sessions, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from ntm.tensor import Array
from server.errors import ServingError
from server.model.layout import Steps
from server.runtime.runner import Rows

NO_SLOTS = frozenset[int]()


class EngineRequest:
    """T steps, T at least 0, for each of S sessions, and their state afterwards if it is wanted.

    It is whole or nothing for each session: the steps begin from the state in one slot and leave theirs in another,
    which the session takes over only when all of them have succeeded.
    """

    __slots__ = (
        "end_time_s",
        "enqueue_time_s",
        "errors",
        "first_steps",
        "has_ended",
        "initial_slots",
        "inputs",
        "is_from_caller",
        "is_started",
        "load_state",
        "num_left",
        "num_rows",
        "outputs",
        "reads_state",
        "session_ids",
        "shared_slots",
        "slots",
        "start_time_s",
        "state",
        "steps_done",
        "submit_time_s",
        "trace",
        "trace_names",
        "write_slots",
    )

    def __init__(
        self,
        session_ids: Sequence[str],
        first_steps: Sequence[int] | Rows,
        inputs: Steps,
        slots: Sequence[int] | Rows,
        write_slots: Sequence[int] | Rows,
        shared_slots: frozenset[int] = NO_SLOTS,
        load_state: dict[str, Array] | None = None,
        reads_state: bool = False,
    ) -> None:
        """Nothing has run.

        Args:
            session_ids: S.
            first_steps: S, for what is told of a step that fails.
            inputs: [S, T].
            slots: S, where each state is at first.
            write_slots: S, where each state goes in the end, and whenever the request must wait for its next turn.
            shared_slots: those of `slots` that somebody else holds as well, and will need when this has ended.
            load_state: by name, [S, ...state shape] each: what is to be put into `slots` before the first turn.
            reads_state: whether the state after the last step is to be read.
        """
        self.session_ids = session_ids
        self.first_steps = first_steps
        self.inputs = inputs
        self.num_rows: int
        self.num_left: int
        self.num_rows, self.num_left = inputs.shape
        self.slots = slots
        self.write_slots = write_slots
        self.shared_slots = shared_slots
        self.load_state = load_state
        self.reads_state = reads_state
        self.trace_names: Sequence[str] = ()
        """Of the states that are to be read after every step."""
        self.trace: list[dict[str, Array]] = []
        """For each step that was run, these states by name, [S, ...state shape] each."""
        self.initial_slots: Sequence[int] | Rows | None = None
        """S, where the state is from which steps that are reset begin; None: the model's own for all."""
        self.outputs: Steps | None = None
        """[S, T]; None until the first turn."""
        self.state: dict[str, Array] | None = None
        """By name, [S, ...state shape] each."""
        self.errors: dict[int, ServingError] = {}
        """By index, of the sessions whose steps failed."""
        self.steps_done = 0
        self.is_from_caller = False
        """A caller asked for it, and can be told to try again."""
        self.is_started = False
        """Its first turn was taken: it runs to its end."""
        self.has_ended = False
        """All its turns are done, or every session has failed."""
        self.submit_time_s = perf_counter()
        self.enqueue_time_s = 0.0
        """When it was enqueued for its first turn."""
        self.start_time_s = 0.0
        """When its first turn began; 0.0 before that."""
        self.end_time_s = 0.0
        """When its last turn had ended; 0.0 before that. Both by `time.perf_counter`, as `submit_time_s`."""

    @property
    def present_slots(self) -> Sequence[int] | Rows:
        """Whose the state of each session is by now; the state cache knows where it is."""
        return self.write_slots if self.steps_done else self.slots

    def take_outputs(self, outputs: Steps) -> None:
        """Note the outputs [S, K] of the next K steps."""
        num_steps = outputs.shape[1]
        if num_steps == self.inputs.shape[1]:
            self.outputs = outputs
        else:
            if self.outputs is None:
                self.outputs = np.zeros(self.inputs.shape, outputs.dtype)
            self.outputs[:, self.steps_done : self.steps_done + num_steps] = outputs
        self.steps_done += num_steps
        self.num_left -= num_steps

    def fail(self, row: int, error: ServingError) -> None:
        """One session gets no result; its first error counts."""
        self.errors.setdefault(row, error)
        self.has_ended = len(self.errors) == self.num_rows
