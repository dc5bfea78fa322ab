"""The step as a function of named tensors, which is what a graph is.

`training.model` has the cell; here its state is spread into tensors with the names that the graph's inputs and
outputs bear, and the outputs become what the task's loss says that they stand for, such as probabilities.

Shapes: B batch, I input size, O output size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.losses import LOSSES, Loss
from training.model import Cell, named_tensors, with_tensors

INPUT = "input"
OUTPUT = "output"


class Step(nn.Module):
    """(input, *state) -> (output, *next state).

    Args:
        cell: the cell.
        loss: which it was trained by.
    """

    def __init__(self, cell: Cell, loss: Loss = LOSSES["binary-cross-entropy"]) -> None:
        super().__init__()
        self.cell = cell
        self.loss = loss
        with torch.no_grad():
            self._like = cell.initial_state(1)

    @property
    def state_names(self) -> list[str]:
        """Names of the state tensors, in the order `forward` takes them."""
        return list(named_tensors(self._like))

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [INPUT, *self.state_names]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return [OUTPUT, *(f"next_{name}" for name in self.state_names)]

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state a session starts from, by name; batch axis first."""
        with torch.no_grad():
            named = named_tensors(self.cell.initial_state(batch_size))
        return {name: tensor.detach().contiguous() for name, tensor in named.items()}

    def forward(self, inputs: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """One time step.

        Args:
            inputs: [B, I].
            states: each state tensor, in the order of `state_names`.

        Returns:
            [B, O] the output, as callers receive it, and each next state tensor in the same order.
        """
        state = with_tensors(self._like, dict(zip(self.state_names, states, strict=True)))
        logits, next_state = self.cell.step(inputs, state)
        return self.loss.activate(logits), *named_tensors(next_state).values()
