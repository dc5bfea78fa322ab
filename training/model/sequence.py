"""The sequence: a whole unrolling of a cell with an LSTM controller as one operation, for training on a CPU.

For layers without a memory it is torch's own. For the machine, `kernel.py` compiles what a step does to the memory,
and here the rest of the step joins it: the gradient is worked out by hand, so that torch keeps no books on every step,
and the gradient of the weights is one matrix product over all steps instead of one a step. `cell.py` and `plain.py` say
the same step by step, and a test holds them together.

Shapes: T steps, B batch, I input size, C controller size, H heads, R read heads, N memory rows, M row width,
P numbers that the heads ask for, Z = R M + C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.model import kernel
from training.model.cell import NTMCell
from training.model.controller import LSTMLayer
from training.model.heads import HeadSizes
from training.model.kernel import compiled
from training.model.plain import PlainCell
from training.model.state import LSTMState


def fits(cell: NTMCell | PlainCell) -> bool:
    """Whether there is an operation for this cell: a machine with one LSTM layer, or any number of them alone."""
    layers = cell.controller.layers
    are_lstm = all(isinstance(layer, LSTMLayer) for layer in layers)
    return are_lstm and (isinstance(cell, PlainCell) or len(layers) == 1)


def unrolled_outputs(cell: NTMCell | PlainCell, inputs: Tensor) -> Tensor:
    """What `unroll(cell, inputs)` gives, [T, B, I] to logits [T, B, O], for float32 on a CPU."""
    return _of_plain(cell, inputs) if isinstance(cell, PlainCell) else _of_machine(cell, inputs)


def _of_plain(cell: PlainCell, inputs: Tensor) -> Tensor:
    weights: list[Tensor] = []
    for layer in cell.controller.layers:
        # torch has the gates in another order, and a second bias.
        weight, bias = (
            torch.cat([enter, keep, candidate, leave])
            for enter, keep, leave, candidate in (layer.gates.weight.chunk(4), layer.gates.bias.chunk(4))
        )
        of_inputs, of_hidden = weight.tensor_split([weight.shape[1] - layer.size], dim=1)
        weights += [of_inputs.contiguous(), of_hidden.contiguous(), bias, torch.zeros_like(bias)]
    before: tuple[LSTMState, ...] = cell.initial_state(inputs.shape[1]).controller  # type: ignore[assignment]
    stacked = [torch.stack(parts) for parts in zip(*before, strict=True)]
    hidden, _, _ = torch.lstm(inputs, stacked, weights, True, len(before), 0.0, True, False, False)
    outputs: Tensor = cell.output(hidden)
    return outputs


def _of_machine(cell: NTMCell, inputs: Tensor) -> Tensor:
    state = cell.initial_state(inputs.shape[1])
    [layer], [before] = cell.controller.layers, state.controller
    assert isinstance(layer, LSTMLayer)
    assert isinstance(before, LSTMState)
    hidden, read = _Sequence.apply(  # type: ignore[no-untyped-call]
        inputs,
        layer.gates.weight,
        layer.gates.bias,
        cell.heads.weight,
        cell.heads.bias,
        state.memory,
        torch.cat([state.read_weightings, state.write_weightings], dim=1),
        state.read_vectors,
        before.hidden,
        before.cell,
        cell.heads.sizes,
    )
    outputs: Tensor = cell.output(torch.cat([hidden, read], dim=-1))
    return outputs


class _Sequence(torch.autograd.Function):
    """To the hidden state [T, B, C] and what was read [T, B, R M]. What each step finds is kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
        first_memory: Tensor,
        first_weightings: Tensor,
        first_read: Tensor,
        first_hidden: Tensor,
        first_cell: Tensor,
        sizes: HeadSizes,
    ) -> tuple[Tensor, Tensor]:
        num_steps, batch, input_size = inputs.shape
        size = first_hidden.shape[1]
        num_read = first_read[0].numel()
        memory = torch.empty(num_steps + 1, *first_memory.shape)
        weightings = torch.empty(num_steps + 1, *first_weightings.shape)
        fed_back = torch.empty(num_steps + 1, batch, num_read + size)  # What was read, and the hidden state.
        cell = torch.empty(num_steps + 1, batch, size)
        shown = torch.empty(num_steps, batch, size)  # tanh of the cell state.
        read = torch.empty(num_steps, *first_read.shape)
        requested = torch.empty(num_steps, batch, sizes.num_requested)
        kept = torch.empty(num_steps, batch, 3, *first_weightings.shape[1:])
        memory[0], weightings[0], cell[0] = first_memory, first_weightings, first_cell
        fed_back[0, :, :num_read], fed_back[0, :, num_read:] = first_read.flatten(1), first_hidden

        gates = torch.addmm(bias, inputs.reshape(-1, input_size), weight[:, :input_size].T)
        gates = gates.view(num_steps, batch, 4 * size)
        back_weight, head_weight_turned = weight[:, input_size:].T.contiguous(), head_weight.T.contiguous()
        n_memory, n_weightings, n_fed_back = _arrays(memory, weightings, fed_back)
        n_read, n_requested, n_kept = _arrays(read, requested, kept)
        for t in range(num_steps):
            gates[t].addmm_(fed_back[t], back_weight)
            # The gates are left as they open and the candidate as it is, for the way back.
            enter, keep, leave, candidate = gates[t].chunk(4, dim=1)
            gates[t, :, : 3 * size].sigmoid_()
            candidate.tanh_()
            torch.mul(keep, cell[t], out=cell[t + 1]).addcmul_(enter, candidate)
            torch.tanh(cell[t + 1], out=shown[t])
            torch.mul(leave, shown[t], out=fed_back[t + 1, :, num_read:])
            torch.addmm(head_bias, fed_back[t + 1, :, num_read:], head_weight_turned, out=requested[t])
            kernel.access_forward(
                n_requested[t],
                n_memory[t],
                n_weightings[t],
                sizes.num_read_heads,
                sizes.num_shifts,
                n_weightings[t + 1],
                n_memory[t + 1],
                n_read[t],
                n_kept[t],
            )
            n_fed_back[t + 1, :, :num_read] = n_read[t].reshape(batch, num_read)
        ctx.save_for_backward(
            inputs, weight, head_weight, memory, weightings, fed_back, cell, shown, gates, requested, kept
        )
        ctx.sizes = sizes
        return fed_back[1:, :, num_read:].clone(), read.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden: Tensor, of_read: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, head_weight, memory, weightings, fed_back, cell, shown, gates, requested, kept = (
            ctx.saved_tensors
        )
        sizes: HeadSizes = ctx.sizes
        num_steps, batch, input_size = inputs.shape
        size = cell.shape[2]
        num_read = fed_back.shape[2] - size
        back_weight = weight[:, input_size:].contiguous()
        of_gates, of_requested = torch.empty_like(gates), torch.empty_like(requested)
        # What one step hands to the one before it; memory and weightings in turn in one of two places.
        of_memory = torch.zeros(2, *memory.shape[1:])
        of_weightings = torch.zeros(2, *weightings.shape[1:])
        of_cell = torch.zeros(batch, size)
        of_fed_back = torch.zeros(batch, num_read + size)
        of_both = torch.cat([of_read, of_hidden], dim=-1)
        of_now = torch.empty(batch, num_read + size)
        n_memory, n_weightings, n_cell, n_shown, n_gates = _arrays(memory, weightings, cell, shown, gates)
        n_requested, n_kept, n_of_now, n_of_cell = _arrays(requested, kept, of_now, of_cell)
        n_of_gates, n_of_requested, n_of_memory, n_of_weightings = _arrays(
            of_gates, of_requested, of_memory, of_weightings
        )
        for t in reversed(range(num_steps)):
            now, before = t % 2, (t + 1) % 2
            torch.add(of_both[t], of_fed_back, out=of_now)
            of_read_now = np.ascontiguousarray(n_of_now[:, :num_read])
            kernel.access_backward(
                n_requested[t],
                n_memory[t],
                n_weightings[t],
                sizes.num_read_heads,
                sizes.num_shifts,
                n_weightings[t + 1],
                n_memory[t + 1],
                n_kept[t],
                n_of_weightings[now],
                n_of_memory[now],
                of_read_now.reshape(batch, sizes.num_read_heads, sizes.row_width),
                n_of_requested[t],
                n_of_memory[before],
                n_of_weightings[before],
            )
            of_now[:, num_read:].addmm_(of_requested[t], head_weight)
            _lstm_backward(n_gates[t], n_cell[t], n_shown[t], n_of_now, num_read, n_of_cell, n_of_gates[t])
            torch.mm(of_gates[t], back_weight, out=of_fed_back)

        flat_gates, flat_requested = of_gates.flatten(0, 1), of_requested.flatten(0, 1)
        of_weight = torch.empty_like(weight)
        torch.mm(flat_gates.T, inputs.reshape(-1, input_size), out=of_weight[:, :input_size])
        torch.mm(flat_gates.T, fed_back[:-1].flatten(0, 1), out=of_weight[:, input_size:])
        of_head_weight = flat_requested.T @ fed_back[1:, :, num_read:].reshape(-1, size)
        first = 1  # Where step 0 left them.
        return (
            None,
            of_weight,
            flat_gates.sum(dim=0),
            of_head_weight,
            flat_requested.sum(dim=0),
            of_memory[first],
            of_weightings[first],
            of_fed_back[:, :num_read].reshape(batch, sizes.num_read_heads, sizes.row_width),
            of_fed_back[:, num_read:],
            of_cell,
            None,
        )


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]


@compiled
def _lstm_backward(gates, cell, shown, of_now, num_read, of_cell, of_gates):  # type: ignore[no-untyped-def]
    """From the gradient of the hidden state, in the columns of `of_now` from `num_read` on, and of the next cell state,
    in `of_cell`, to those of the gates' sums and, in its place, of the cell state."""
    num_batch, size = cell.shape
    one = np.float32(1)
    for b in range(num_batch):
        for i in range(size):
            enter, keep, leave, candidate = (
                gates[b, i],
                gates[b, size + i],
                gates[b, 2 * size + i],
                gates[b, 3 * size + i],
            )
            of_hidden = of_now[b, num_read + i]
            total = of_cell[b, i] + of_hidden * leave * (one - shown[b, i] * shown[b, i])
            of_gates[b, i] = total * candidate * enter * (one - enter)
            of_gates[b, size + i] = total * cell[b, i] * keep * (one - keep)
            of_gates[b, 2 * size + i] = of_hidden * shown[b, i] * leave * (one - leave)
            of_gates[b, 3 * size + i] = total * enter * (one - candidate * candidate)
            of_cell[b, i] = total * keep
