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

from training.model import NTMCell
from training.model.controller import LSTMController


class TextbookStep(nn.Module):
    """One step of a cell with an LSTM controller."""

    def __init__(self, cell: NTMCell) -> None:
        """Take the weights of `cell`."""
        super().__init__()
        assert isinstance(cell.controller, LSTMController)
        self.num_heads_of_kind = [cell.num_read_heads, cell.num_write_heads]
        self.row_width = cell.heads.row_width
        self.controller = _lstm_cell(cell.controller)
        self.output = cell.output

        every, num_heads = cell.heads.linear, sum(self.num_heads_of_kind)
        num_written = cell.num_write_heads * self.row_width
        addresses, erase, add = torch.arange(len(every.bias)).split(
            [len(every.bias) - 2 * num_written, num_written, num_written]
        )
        by_head = addresses.reshape(num_heads, -1)
        num_shifts = by_head.shape[1] - self.row_width - 3
        parts = by_head.split([self.row_width, num_shifts, 1, 1, 1], dim=1)
        self.key, self.kernel, self.strength, self.sharpness, self.gate = (
            _rows(every, part.flatten()) for part in parts
        )
        self.erase, self.add = _rows(every, erase), _rows(every, add)

    def forward(
        self,
        inputs: Tensor,
        memory: Tensor,
        read_weightings: Tensor,
        write_weightings: Tensor,
        read_vectors: Tensor,
        hidden: Tensor,
        cell: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            inputs: [B, I].
            memory: [B, N, M].
            read_weightings: [B, R, N].
            write_weightings: [B, W, N].
            read_vectors: [B, R, M].
            hidden: [B, C].
            cell: [B, C].

        Returns:
            [B, O] the output, in (0, 1), and the next state in the same order.
        """
        hidden, cell = self.controller(torch.cat([inputs, read_vectors.flatten(1)], dim=-1), (hidden, cell))
        previous = torch.cat([read_weightings, write_weightings], dim=1)
        read_weightings, write_weightings = self._address(hidden, memory, previous).split(
            self.num_heads_of_kind, dim=1
        )
        by_column = (self.row_width, -1)
        erase, add = (
            torch.sigmoid(self.erase(hidden)).unflatten(1, by_column),
            self.add(hidden).unflatten(1, by_column),
        )
        for head in range(write_weightings.shape[1]):  # eq. 3
            memory = memory * (1 - write_weightings[:, head, :, None] * erase[:, None, :, head])
        for head in range(write_weightings.shape[1]):  # eq. 4
            memory = memory + write_weightings[:, head, :, None] * add[:, None, :, head]
        read_vectors = read_weightings @ memory  # eq. 2
        outputs = torch.sigmoid(self.output(torch.cat([hidden, read_vectors.flatten(1)], dim=-1)))
        return outputs, memory, read_weightings, write_weightings, read_vectors, hidden, cell

    def _address(self, hidden: Tensor, memory: Tensor, previous: Tensor) -> Tensor:
        """The weightings [B, H, N] of all heads (eq. 5 to 9)."""
        by_head = (sum(self.num_heads_of_kind), -1)
        key, kernel = self.key(hidden).unflatten(1, by_head), self.kernel(hidden).unflatten(1, by_head)
        strength = F.softplus(self.strength(hidden)).unsqueeze(2)
        sharpness = 1 + F.softplus(self.sharpness(hidden)).unsqueeze(2)
        gate = torch.sigmoid(self.gate(hidden)).unsqueeze(2)

        similarity = _normalised(key) @ _normalised(memory).mT  # eq. 6
        by_content = torch.softmax(strength * similarity, dim=-1)  # eq. 5
        gated = gate * by_content + (1 - gate) * previous  # eq. 7
        entries = torch.softmax(kernel, dim=-1).split(1, dim=-1)
        turned = [entry * gated.roll(len(entries) // 2 - i, dims=-1) for i, entry in enumerate(entries)]
        shifted = sum(turned[1:], start=turned[0])  # eq. 8
        powers = (shifted + 1e-16) ** sharpness
        return powers / powers.sum(-1, keepdim=True)  # eq. 9


def _normalised(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-8)


def _rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """The part of a linear map that gives some of its outputs."""
    part = nn.Linear(linear.in_features, len(rows))
    part.load_state_dict({"weight": linear.weight.detach()[rows], "bias": linear.bias.detach()[rows]})
    return part


def _lstm_cell(controller: LSTMController) -> nn.LSTMCell:
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
