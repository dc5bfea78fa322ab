"""Controllers: the network that reads the input and what the heads read, and decides (section 3.4).

One or more layers of a kind, each fed by the one below, behind one interface: `step` and `initial_state`. `heads.py`
turns their output into requests; `plain.py` uses a controller without memory, as the paper's baselines do.

Shapes: B batch, I input size, C controller size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from training.model.state import ControllerState, HiddenState, LayerState, LSTMState

ControllerKind = Literal["lstm", "gru", "mgu", "feedforward"]


class Controller(nn.Module):
    """Layers of one kind.

    Args:
        kind: which.
        input_size: numbers that the lowest layer is fed.
        size: units in a layer.
        num_layers: at least 1.
        scale: recurrent weights are drawn from U(±scale / √(inputs + units)).
        forget_bias: of an LSTM's forget gates at the start.
    """

    def __init__(
        self,
        kind: ControllerKind,
        input_size: int,
        size: int,
        num_layers: int = 1,
        scale: float = 5.0,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fed in [input_size] + [size] * (num_layers - 1):
            if kind == "feedforward":
                layers.append(FeedforwardLayer(fed, size))
            elif kind == "lstm":
                layers.append(LSTMLayer(fed, size, scale, forget_bias))
            else:
                layers.append(_OTHERS[kind](fed, size, scale))
        self.layers: Sequence[Any] = cast("Sequence[Any]", nn.ModuleList(layers))

    def step(self, inputs: Sequence[Tensor], state: ControllerState) -> tuple[Tensor, ControllerState]:
        """One step.

        Args:
            inputs: parts that together are [B, I].
            state: of each layer that has one.

        Returns:
            [B, C] the highest layer's output, in (-1, 1), and the next state.
        """
        before = iter(state)
        after: list[LayerState] = []
        for layer in self.layers:
            if isinstance(layer, FeedforwardLayer):
                output: Tensor = layer(torch.cat(list(inputs), dim=-1))
            else:
                output, layer_state = layer.step(inputs, next(before))
                after.append(layer_state)
            inputs = [output]
        return output, tuple(after)

    def initial_state(self, batch_size: int) -> ControllerState:
        """Of each layer that has one, the same in every row."""
        return tuple(
            layer.initial_state(batch_size)
            for layer in self.layers
            if not isinstance(layer, FeedforwardLayer)
        )


class FeedforwardLayer(nn.Linear):
    """A layer of tanh units, [B, I] to [B, C]; whatever it must remember goes through the memory."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__(input_size, size)
        nn.init.xavier_uniform_(self.weight, gain=nn.init.calculate_gain("tanh"))
        nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """In (-1, 1)."""
        return torch.tanh(super().forward(inputs))


class LSTMLayer(nn.Module):
    """Long short-term memory, with a learned initial state."""

    def __init__(self, input_size: int, size: int, scale: float, forget_bias: float = 0.0) -> None:
        super().__init__()
        self.size = size
        self.gates = _linear(input_size + size, 4 * size, scale / math.sqrt(input_size + size))
        nn.init.constant_(self.gates.bias[size : 2 * size], forget_bias)
        self.initial_hidden = _small(size)
        self.initial_cell = _small(size)

    def step(self, inputs: Sequence[Tensor], state: LSTMState) -> tuple[Tensor, LSTMState]:
        """One step: parts that together are [B, I], and [B, C] each, to [B, C] and the next state."""
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


class GRULayer(nn.Module):
    """Gated recurrent units (Cho et al. 2014), as torch has them, with a learned initial state.

    r = σ(R [x, h]), z = σ(Z [x, h]), n = tanh(A x + r (B h)), h' = (1 - z) n + z h, each with its bias.
    """

    def __init__(self, input_size: int, size: int, scale: float) -> None:
        super().__init__()
        self.size = size
        bound = scale / math.sqrt(input_size + size)
        self.gates = _linear(input_size + size, 2 * size, bound)
        self.from_inputs = _linear(input_size, size, bound)
        self.from_hidden = _linear(size, size, bound)
        self.initial_hidden = _small(size)

    def step(self, inputs: Sequence[Tensor], state: HiddenState) -> tuple[Tensor, HiddenState]:
        """One step: parts that together are [B, I], and [B, C], to [B, C] and the next state."""
        both = torch.cat([*inputs, state.hidden], dim=-1)
        reset, keep = torch.sigmoid(self.gates(both)).chunk(2, dim=-1)
        fed = both[:, : -self.size]
        candidate = torch.tanh(self.from_inputs(fed) + reset * self.from_hidden(state.hidden))
        hidden = candidate + keep * (state.hidden - candidate)
        return hidden, HiddenState(hidden)

    def initial_state(self, batch_size: int) -> HiddenState:
        """[B, C], the same in every row."""
        return HiddenState(torch.tanh(self.initial_hidden).expand(batch_size, -1))


class MGULayer(nn.Module):
    """Minimal gated units (Zhou et al. 2016), one gate for both purposes, with a learned initial state.

    f = σ(F [x, h]), n = tanh(A [x, f h]), h' = (1 - f) h + f n, each with its bias.
    """

    def __init__(self, input_size: int, size: int, scale: float) -> None:
        super().__init__()
        bound = scale / math.sqrt(input_size + size)
        self.gate = _linear(input_size + size, size, bound)
        self.candidate = _linear(input_size + size, size, bound)
        self.initial_hidden = _small(size)

    def step(self, inputs: Sequence[Tensor], state: HiddenState) -> tuple[Tensor, HiddenState]:
        """One step: parts that together are [B, I], and [B, C], to [B, C] and the next state."""
        gate = torch.sigmoid(self.gate(torch.cat([*inputs, state.hidden], dim=-1)))
        candidate = torch.tanh(self.candidate(torch.cat([*inputs, gate * state.hidden], dim=-1)))
        hidden = state.hidden + gate * (candidate - state.hidden)
        return hidden, HiddenState(hidden)

    def initial_state(self, batch_size: int) -> HiddenState:
        """[B, C], the same in every row."""
        return HiddenState(torch.tanh(self.initial_hidden).expand(batch_size, -1))


_OTHERS: dict[str, type[GRULayer] | type[MGULayer]] = {
    "gru": GRULayer,
    "mgu": MGULayer,
}


def _linear(input_size: int, size: int, bound: float) -> nn.Linear:
    # The scale decides whether copy is learned: with Xavier's it was not within 28k sequences, with 5 / √(inputs +
    # units) it takes 6 to 32k.
    linear = nn.Linear(input_size, size)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)
    return linear


def _small(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) * 0.05)
