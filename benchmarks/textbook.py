"""The textbook step: the paper's equations one after another, as most implementations have them.

It is the reference that `step_graph.py` holds the exported step against: torch's LSTM cell, a linear map for each
quantity that the heads ask for, memory as [B, N, M], a normalised copy of it for the cosine, and powers for
sharpening. It takes its weights from a cell and computes the same function.

Shapes: B batch, H heads (R that read, then W that write), N memory rows, M row width, C controller size, I input
size, O output size, S shifts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.step import CellStep
from training.model import NTMCell
from training.model.controller import LSTMLayer
from training.model.heads import rows_of


class TextbookStep(CellStep):
    """One step of a cell with an LSTM controller, its memory as [B, N, M]."""

    def __init__(self, cell: NTMCell) -> None:
        """Take the weights of `cell`."""
        super().__init__(cell)
        [layer] = cell.controller.layers
        assert isinstance(layer, LSTMLayer)
        self.num_heads_of_kind = [cell.num_read_heads, cell.num_write_heads]
        self.row_width = cell.heads.sizes.row_width
        self.controller = _lstm_cell(layer)

        every, rows = cell.heads, rows_of(cell.heads.sizes)
        self.key, self.kernel, self.strength, self.sharpness, self.gate, self.erase, self.add = (
            _rows(every, part.flatten()) for part in rows
        )

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """As the cell's, but for the memory's axes."""
        state = super().initial_state(batch_size)
        return state | {"memory": state["memory"].mT.contiguous()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As `Step.forward`."""
        inputs, memory, read_weightings, write_weightings, read_vectors, hidden, cell = tensors
        hidden, cell = self.controller(torch.cat([inputs, read_vectors.flatten(1)], dim=-1), (hidden, cell))
        previous = torch.cat([read_weightings, write_weightings], dim=1)
        read_weightings, write_weightings = torch.split(
            self._address(hidden, memory, previous), self.num_heads_of_kind, dim=1
        )
        by_column = (-1, self.row_width, self.num_heads_of_kind[1])
        erase = torch.sigmoid(self.erase(hidden)).reshape(by_column)
        add = self.add(hidden).reshape(by_column)
        for head in range(write_weightings.shape[1]):  # eq. 3
            memory = memory * (1 - write_weightings[:, head, :, None] * erase[:, None, :, head])
        for head in range(write_weightings.shape[1]):  # eq. 4
            memory = memory + write_weightings[:, head, :, None] * add[:, None, :, head]
        read_vectors = read_weightings @ memory  # eq. 2
        outputs = torch.sigmoid(self.cell.output(torch.cat([hidden, read_vectors.flatten(1)], dim=-1)))
        return outputs, memory, read_weightings, write_weightings, read_vectors, hidden, cell

    def _address(self, hidden: Tensor, memory: Tensor, previous: Tensor) -> Tensor:
        """The weightings [B, H, N] of all heads (eq. 5 to 9)."""
        num_heads = sum(self.num_heads_of_kind)
        key = self.key(hidden).reshape(-1, num_heads, self.row_width)
        kernel = self.kernel(hidden).reshape(-1, num_heads, self.kernel.out_features // num_heads)
        strength = F.softplus(self.strength(hidden)).unsqueeze(2)
        sharpness = 1 + F.softplus(self.sharpness(hidden)).unsqueeze(2)
        gate = torch.sigmoid(self.gate(hidden)).unsqueeze(2)

        similarity = _normalised(key) @ _normalised(memory).mT  # eq. 6
        by_content = torch.softmax(strength * similarity, dim=-1)  # eq. 5
        gated = gate * by_content + (1 - gate) * previous  # eq. 7
        entries = torch.split(torch.softmax(kernel, dim=-1), 1, dim=-1)
        turned = [entry * gated.roll(len(entries) // 2 - i, dims=-1) for i, entry in enumerate(entries)]
        shifted = sum(turned[1:], start=turned[0])  # eq. 8
        powers = (shifted + 1e-16) ** sharpness
        return powers / powers.sum(-1, keepdim=True)  # eq. 9


def _normalised(vectors: Tensor) -> Tensor:
    normalised: Tensor = vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-8)
    return normalised


def _rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """The part of a linear map that gives some of its outputs."""
    part = nn.Linear(linear.in_features, len(rows))
    part.load_state_dict({"weight": linear.weight.detach()[rows], "bias": linear.bias.detach()[rows]})
    return part


def _lstm_cell(controller: LSTMLayer) -> nn.LSTMCell:
    """Torch's cell, which has its gates in another order and a matrix for the inputs and one for the state."""
    enter, keep, leave, candidate = torch.arange(4 * controller.size).chunk(4)
    gates = _rows(controller.gates, torch.cat([enter, keep, candidate, leave]))
    input_size = gates.in_features - controller.size
    cell = nn.LSTMCell(input_size, controller.size)
    cell.load_state_dict(
        {
            "weight_ih": gates.weight[:, :input_size],
            "weight_hh": gates.weight[:, input_size:],
            "bias_ih": gates.bias,
            "bias_hh": torch.zeros_like(gates.bias),
        }
    )
    return cell
