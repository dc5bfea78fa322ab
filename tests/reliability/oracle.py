"""What a session must be: small models stepped in numpy, one session alone, with no server and nothing clever.

Whatever is done to a real session through a real server is done to a `Known` as well; every answer must then be the
same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import numpy as np

from tests import step_models

WIDTH = step_models.WIDTH
State = dict[str, np.ndarray]

MODELS: dict[str, Callable[[], bytes]] = {
    "accumulator": step_models.accumulator,
    "delay_line": step_models.delay_line,
    "fragile": step_models.fragile,
}
FIRST_ROW_THAT_FAILS = 8
"""Inputs of the fragile model whose first value is this or more fail."""


class StepFailsError(Exception):
    """The model fails on this input."""


def initial_state(model: str) -> State:
    names = {"accumulator": ["sum"], "delay_line": ["a", "b"], "fragile": ["first", "second"]}[model]
    return {name: np.zeros(WIDTH, np.float32) for name in names}


def step(model: str, state: State, x: np.ndarray) -> tuple[np.ndarray, State]:
    """One step, as the docstrings in step_models say."""
    if model == "accumulator":
        total = np.float32(0.5) * state["sum"] + x
        return total, {"sum": total}
    if model == "delay_line":
        return state["b"], {"a": x, "b": state["a"]}
    if x[0] >= FIRST_ROW_THAT_FAILS:
        raise StepFailsError
    first, second = state["first"] + x, state["second"] + x
    return first + second, {"first": first, "second": second}


def random_inputs(num_steps: int, seed: int) -> np.ndarray:
    """Inputs on which no model fails."""
    generator = np.random.default_rng(seed)
    inputs = generator.uniform(-1, 1, (num_steps, WIDTH)).astype(np.float32)
    inputs[:, 0] = generator.integers(0, FIRST_ROW_THAT_FAILS, num_steps)
    return inputs


class Known:
    """One session as it must be."""

    def __init__(self, model: str, window: int) -> None:
        self.model = model
        self.window = window
        self.first_step = 0
        """Where its history begins: a fork and an import have none of what came before."""
        self.state = initial_state(model)
        self.inputs: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.reset_steps: set[int] = set()
        self.request: Mapping[str, str] = {}
        """What made it."""

    @property
    def next_step(self) -> int:
        return self.first_step + len(self.inputs)

    @property
    def oldest_step(self) -> int:
        """The first step whose answer is given again."""
        return max(self.first_step, self.next_step - self.window)

    def copy(self) -> Known:
        """A session that begins as this one is."""
        copied = Known(self.model, self.window)
        copied.first_step = self.next_step
        copied.state = deepcopy(self.state)
        return copied

    def recorded_inputs(self, first_step: int) -> np.ndarray:
        """The inputs that ran from a step on."""
        return np.array(self.inputs[first_step - self.first_step :], np.float32).reshape(-1, WIDTH)

    def step(self, inputs: np.ndarray, first_step: int | None = None) -> np.ndarray | str:
        """Run a message: its outputs, or the reason with which it is refused."""
        first_step = self.next_step if first_step is None else first_step
        if first_step > self.next_step:
            return "STEP_GAP"
        if first_step < self.oldest_step:
            return "STEP_TOO_OLD"
        known = self.recorded_inputs(first_step)[: len(inputs)]
        if known.tobytes() != inputs[: len(known)].tobytes():
            return "INPUT_MISMATCH"
        state, new_outputs = self.state, []
        try:
            for row in inputs[len(known) :]:
                output, state = step(self.model, state, row)
                new_outputs.append(output)
        except StepFailsError:
            return "STEP_FAILED"
        self.state = state
        self.inputs += list(inputs[len(known) :])
        self.outputs += new_outputs
        start = first_step - self.first_step
        return np.array(self.outputs[start : start + len(inputs)])

    def reset(self, at_step: int) -> str:
        """Go back to the initial state; "" or the reason with which it is refused."""
        if at_step in self.reset_steps and at_step >= self.oldest_step:
            return ""
        if at_step != self.next_step:
            return "STEP_GAP" if at_step > self.next_step else "STEP_TOO_OLD"
        self.reset_steps.add(at_step)
        self.state = initial_state(self.model)
        return ""
