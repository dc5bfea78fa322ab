"""Controllers: the network that reads the input and what the heads read, and decides (section 3.4).

An LSTM or a single feed-forward layer, behind one interface: `step` and `initial_state`. `heads.py` turns
their output into requests.

Shapes: B batch, I input size, C controller size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from training.model.state import ControllerState, LSTMState, Stateless

ControllerKind = Literal["lstm", "feedforward"]


def make_controller(
    kind: ControllerKind, input_size: int, size: int
) -> LSTMController | FeedforwardController:
    """The controller of this kind."""
    if kind == "lstm":
        return LSTMController(input_size, size)
    return FeedforwardController(input_size, size)


class LSTMController(nn.Module):
    """One LSTM layer with a learned initial state."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.gates = nn.Linear(input_size + size, 4 * size)
        # The scale decides whether copy is learned: with Xavier's it was not within 28k sequences, with
        # this one it takes 6 to 32k.
        bound = 5 / math.sqrt(input_size + size)
        nn.init.uniform_(self.gates.weight, -bound, bound)
        nn.init.zeros_(self.gates.bias)
        self.initial_hidden = nn.Parameter(torch.randn(size) * 0.05)
        self.initial_cell = nn.Parameter(torch.randn(size) * 0.05)

    def step(self, inputs: Sequence[Tensor], state: ControllerState) -> tuple[Tensor, LSTMState]:
        """One step.

        Args:
            inputs: parts that together are [B, I].
            state: [B, C] each.

        Returns:
            [B, C] the output, in (-1, 1), and the next state.
        """
        assert isinstance(state, LSTMState)
        gates = self.gates(torch.cat([*inputs, state.hidden], dim=-1))
        opened, candidate = torch.split(gates, [3 * self.size, self.size], dim=-1)
        enter, keep, leave = torch.sigmoid(opened).chunk(3, dim=-1)
        cell = keep * state.cell + enter * torch.tanh(candidate)
        hidden = leave * torch.tanh(cell)
        return hidden, LSTMState(hidden, cell)

    def initial_state(self, batch_size: int) -> LSTMState:
        """[B, C] each, the same in every row."""
        return LSTMState(
            torch.tanh(self.initial_hidden).expand(batch_size, -1), self.initial_cell.expand(batch_size, -1)
        )


class FeedforwardController(nn.Module):
    """One layer of tanh units; whatever it must remember goes through the memory."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(input_size, size)
        nn.init.xavier_uniform_(self.linear.weight, gain=nn.init.calculate_gain("tanh"))
        nn.init.zeros_(self.linear.bias)

    def step(self, inputs: Sequence[Tensor], state: ControllerState) -> tuple[Tensor, Stateless]:
        """One step: parts that together are [B, I] to [B, C], in (-1, 1)."""
        return torch.tanh(self.linear(torch.cat(list(inputs), dim=-1))), Stateless()

    def initial_state(self, batch_size: int) -> Stateless:
        """Nothing, whatever the batch."""
        return Stateless()
