"""The step as a function of tensors with names, which is what a graph is.

A module `(inputs, state) -> (outputs, next state)` is spread into tensors with the names that the graph's inputs and
outputs bear. `CellStep` does it for a trained cell, whose outputs become what the task's loss says that they stand for,
such as probabilities.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from export.access import for_onnx_runtime
from export.errors import StepError
from export.naming import cell_states, named, rebuilt
from training.losses import LOSSES, Loss
from training.model import Cell

INPUT = "input"
OUTPUT = "output"


class Step(nn.Module):
    """(*inputs, *states) -> (*outputs, *next states).

    Args:
        module: `(inputs, state) -> (outputs, next state)`; it is left as it is.
        inputs: an example of what a step takes, with a batch of 1; see `naming.py` for how tensors get their names.
        state: what a session starts from, with a batch of 1.
        batch_axes: of the inputs and states that have their batch axis elsewhere than in front, by name.
        session_inputs: the states that a step does not give back: they stay as a session has them.

    Raises:
        StepError: the module is no such step.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        state: Any,
        *,
        batch_axes: Mapping[str, int] | None = None,
        session_inputs: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).eval()
        self._like = inputs, state
        self.inputs = {name: tensor.detach().clone() for name, tensor in named(inputs, INPUT).items()}
        self.states = {name: tensor.detach().clone() for name, tensor in named(state, "state").items()}
        self.cell_states = cell_states(state)
        self.session_inputs = list(session_inputs)
        self.batch_axes = dict.fromkeys([*self.inputs, *self.states], 0) | dict(batch_axes or {})
        self._check_names()
        self.outputs = self._tried(1)
        self.hard_wired = ""
        """Why the module takes a batch of 1 and no other; empty if it takes any."""
        try:
            self.batch_axes |= self._output_axes()
        except StepError as error:
            self.fix_batch(str(error))

    @property
    def state_names(self) -> list[str]:
        """Names of the state tensors, in the order `forward` takes them."""
        return list(self.states)

    @property
    def carried_names(self) -> list[str]:
        """Names of those that a step gives back."""
        return [name for name in self.states if name not in self.session_inputs]

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [*self.inputs, *self.states]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return [*self.outputs, *(f"next_{name}" for name in self.carried_names)]

    def example_inputs(self, batch_size: int) -> dict[str, Tensor]:
        """The example of every input, the same in every row."""
        return {name: self._repeated(name, tensor, batch_size) for name, tensor in self.inputs.items()}

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state a session starts from, by name, the same in every row."""
        return {name: self._repeated(name, tensor, batch_size) for name, tensor in self.states.items()}

    def fix_batch(self, reason: str) -> None:
        """From now on it is a step of a batch of 1.

        Outputs of which the batch axis is not known have it in front if an axis of length 1 is there, else none.
        """
        self.hard_wired = reason
        for name, tensor in self.outputs.items():
            self.batch_axes.setdefault(name, 0 if tensor.dim() and tensor.shape[0] == 1 else -1)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """One time step: the inputs and then the states, in the order of `input_names`, to what `output_names` says."""
        given = iter(tensors)
        inputs, state = (rebuilt(like, given) for like in self._like)
        outputs, after = self.module(inputs, state)
        next_states = named(after, "state")
        return *named(outputs, OUTPUT).values(), *(next_states[name] for name in self.carried_names)

    def for_onnx_runtime(self) -> Step:
        """The same, its machines in the operations that ONNX Runtime runs best; a copy."""
        return self._with(for_onnx_runtime(self.module))

    def in_double_precision(self) -> Step:
        """The same in float64; a copy."""
        exact = self._with(copy.deepcopy(self.module).double())
        for tensors in (exact.inputs, exact.states):
            tensors |= {
                name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()
            }
        return exact

    def _with(self, module: nn.Module) -> Step:
        other = copy.copy(self)
        other._modules = self._modules | {"module": module}  # a Module's copy shares its table of modules
        other.inputs, other.states = dict(self.inputs), dict(self.states)
        return other

    def _output_axes(self) -> dict[str, int]:
        """Where the outputs have their batch axis, by runs."""
        two, three = self._tried(2), self._tried(3)
        found = {}
        for name, tensor in self.outputs.items():
            axes = [axis for axis in range(tensor.dim()) if two[name].shape[axis] != three[name].shape[axis]]
            if len(axes) != 1 or tensor.shape[axes[0]] != 1:
                raise StepError(
                    f"the output {name} is {list(two[name].shape)} for a batch of 2 and {list(three[name].shape)} for "
                    "one of 3: exactly one axis must have the batch's length"
                )
            found[name] = axes[0]
        return found

    def _repeated(self, name: str, tensor: Tensor, batch_size: int) -> Tensor:
        return torch.cat([tensor] * batch_size, dim=self.batch_axes[name])

    def _check_names(self) -> None:
        if not self.states:
            raise StepError("a step without a state needs no session: give the state that it starts from")
        unknown = [name for name in self.batch_axes if name not in self.inputs and name not in self.states]
        unknown += [name for name in self.session_inputs if name not in self.states]
        if unknown:
            raise StepError(f"there is no {', '.join(unknown)}: there are {', '.join(self.input_names)}")
        if both := self.inputs.keys() & self.states.keys():
            raise StepError(f"an input and a state have the name {', '.join(sorted(both))}: rename one")
        for name, tensor in [*self.inputs.items(), *self.states.items()]:
            axis = self.batch_axes[name]
            if not 0 <= axis < tensor.dim() or tensor.shape[axis] != 1:
                raise StepError(
                    f"the example of {name} is {list(tensor.shape)}: give it with a batch of 1 on axis {axis}, or say "
                    "by batch_axes where its batch is"
                )

    @torch.no_grad()
    def _tried(self, batch_size: int) -> dict[str, Tensor]:
        """The outputs of a step at a batch size; what it gives back must be what it takes."""
        inputs, states = (
            {name: self._repeated(name, tensor, batch_size) for name, tensor in tensors.items()}
            for tensors in (self.inputs, self.states)
        )
        given = iter([*inputs.values(), *states.values()])
        try:
            result = self.module(*(rebuilt(like, given) for like in self._like))
        except Exception as error:
            raise StepError(f"the module fails at a batch of {batch_size}: {error}") from error
        if not isinstance(result, tuple) or len(result) != 2:
            raise StepError(f"a step gives (outputs, next state), not {type(result).__name__}")
        outputs, after = named(result[0], OUTPUT), named(result[1], "state")
        if after.keys() != set(self.carried_names):
            raise StepError(
                f"the step gives back the states {', '.join(after)} and takes {', '.join(self.carried_names)}: these "
                "must be the same; name in session_inputs what stays as it is"
            )
        for name, tensor in after.items():
            if tensor.shape != states[name].shape or tensor.dtype != states[name].dtype:
                raise StepError(
                    f"the state {name} goes in as {states[name].dtype} {list(states[name].shape)} and comes back as "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
        taken = {*self.inputs, *self.states, *(f"next_{name}" for name in after)}
        if both := outputs.keys() & taken:
            raise StepError(f"the output {', '.join(sorted(both))} has the name of another tensor: rename it")
        return outputs


class CellStep(Step):
    """One time step of a trained cell.

    Args:
        cell: the cell.
        loss: which it was trained by.
    """

    module: CellModule

    def __init__(self, cell: Cell, loss: Loss = LOSSES["binary-cross-entropy"]) -> None:
        with torch.no_grad():
            state = cell.initial_state(1)
        super().__init__(CellModule(cell, loss), torch.zeros(1, cell.input_size), state)

    @property
    def cell(self) -> Cell:
        """The cell, a copy of the one that was given."""
        return self.module.cell


class CellModule(nn.Module):
    """A cell as a module `(inputs, state) -> (outputs, next state)`.

    Args:
        cell: the cell.
        loss: which it was trained by: it says what the outputs stand for.
    """

    def __init__(self, cell: Cell, loss: Loss) -> None:
        super().__init__()
        self.cell = cell
        self.loss = loss

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """[B, I] to the output [B, O], as callers receive it, and the next state."""
        outputs, after = self.cell.step(inputs, state)
        return self.loss.activate(outputs), after
