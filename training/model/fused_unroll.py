"""The fused unroll: all steps of a cell with an LSTM controller as one operation, for training on a CPU.

For layers without a memory it is torch's own. For the machine, `kernel.py` compiles what a step does to the memory,
and here the rest of the step joins it: the gradient is worked out by hand, so that torch keeps no books on every step,
and the gradient of the weights is one matrix product over all steps instead of one a step. `cell.py` and `plain.py` say
the same step by step, and a test holds them together.

Shapes: T steps, B batch, I input size, C controller size, H heads, R read heads, N memory rows, M row width,
P numbers that the heads ask for, Z = R M + C.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.model import kernel
from training.model.cell import NTMCell
from training.model.controller import LSTMLayer
from training.model.heads import HeadSizes
from training.model.kernel import compiled
from training.model.plain import PlainCell
from training.model.state import LSTMState, NTMState, PlainState


def can_fuse(cell: nn.Module) -> TypeGuard[NTMCell | PlainCell]:
    """Whether there is an operation for this cell: an NTM with one LSTM layer, or any number of them alone."""
    if not isinstance(cell, NTMCell | PlainCell):
        return False
    layers = cell.controller.layers
    are_lstm = all(isinstance(layer, LSTMLayer) for layer in layers)
    return are_lstm and (isinstance(cell, PlainCell) or len(layers) == 1)


def unroll_fused(cell: NTMCell | PlainCell, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    """What `unroll(cell, inputs, state)` gives, on a CPU, for tensors of one dtype, float32 or float64.

    Args:
        cell: one for which `can_fuse`.
        inputs: [T, B, I].
        state: where to start.

    Returns:
        [T, B, O] the outputs as logits, and the state after the last step.
    """
    fused = _unroll_plain if isinstance(cell, PlainCell) else _unroll_machine
    return fused(cell, inputs, state)  # type: ignore[arg-type]


def _unroll_plain(cell: PlainCell, inputs: Tensor, state: PlainState) -> tuple[Tensor, PlainState]:
    weights: list[Tensor] = []
    for layer in cell.controller.layers:
        # torch has the gates in another order, and a second bias.
        weight, bias = (
            torch.cat([enter, keep, candidate, leave])
            for enter, keep, leave, candidate in (layer.gates.weight.chunk(4), layer.gates.bias.chunk(4))
        )
        input_weight, hidden_weight = weight.tensor_split([weight.shape[1] - layer.size], dim=1)
        weights += [input_weight.contiguous(), hidden_weight.contiguous(), bias, torch.zeros_like(bias)]
    before: tuple[LSTMState, ...] = state.controller  # type: ignore[assignment]
    stacked = [torch.stack(parts) for parts in zip(*before, strict=True)]
    hidden, *after = torch.lstm(inputs, stacked, weights, True, len(before), 0.0, True, False, False)
    outputs: Tensor = cell.output(hidden)
    return outputs, PlainState(tuple(LSTMState(*layer) for layer in zip(*after, strict=True)))


def _unroll_machine(cell: NTMCell, inputs: Tensor, state: NTMState) -> tuple[Tensor, NTMState]:
    [layer], [before] = cell.controller.layers, state.controller
    assert isinstance(layer, LSTMLayer)
    assert isinstance(before, LSTMState)
    hidden, read, memory, weightings, last_cell = _FusedUnroll.apply(  # type: ignore[no-untyped-call]
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
        torch.is_grad_enabled(),
    )
    outputs: Tensor = cell.output(torch.cat([hidden, read], dim=-1))
    reading, writing = torch.split(weightings, [cell.num_read_heads, cell.num_write_heads], dim=1)
    controller = LSTMState(hidden[-1], last_cell)
    return outputs, NTMState(memory, reading, writing, read[-1].view_as(state.read_vectors), (controller,))


class _FusedUnroll(torch.autograd.Function):
    """To the hidden state [T, B, C] and what was read [T, B, R M] of all steps, and the memory, the weightings and the
    cell state after the last. What each step finds is kept for the way back, if there will be one."""

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
        is_recorded: bool,
    ) -> tuple[Tensor, ...]:
        num_steps, batch, input_size = inputs.shape
        size = first_hidden.shape[1]
        num_read = first_read[0].numel()
        # Without a way back, states take two places in turn, and what a step computes by the way takes one.
        num_states, num_kept = (num_steps + 1, num_steps) if is_recorded else (2, 1)
        empty = inputs.new_empty
        memory = empty(num_states, *first_memory.shape)
        weightings = empty(num_states, *first_weightings.shape)
        cell = empty(num_states, batch, size)
        fed_back = empty(num_steps + 1, batch, num_read + size)  # What was read, and the hidden state.
        shown = empty(num_kept, batch, size)  # tanh of the cell state.
        read = empty(num_steps, *first_read.shape)
        requested = empty(num_kept, batch, sizes.num_requested)
        kept = empty(num_kept, batch, 3, *first_weightings.shape[1:])
        memory[0], weightings[0], cell[0] = first_memory, first_weightings, first_cell
        fed_back[0, :, :num_read], fed_back[0, :, num_read:] = first_read.flatten(1), first_hidden

        gates = torch.addmm(bias, inputs.reshape(-1, input_size), weight[:, :input_size].T)
        gates = gates.view(num_steps, batch, 4 * size)
        back_weight, head_weight_turned = weight[:, input_size:].T.contiguous(), head_weight.T.contiguous()
        np_memory, np_weightings, np_fed_back = _arrays(memory, weightings, fed_back)
        np_read, np_requested, np_kept = _arrays(read, requested, kept)
        for t in range(num_steps):
            before, after, k = t % num_states, (t + 1) % num_states, t % num_kept
            gates[t].addmm_(fed_back[t], back_weight)
            # The gates are left as they open and the candidate as it is, for the way back.
            enter, keep, leave, candidate = gates[t].chunk(4, dim=1)
            gates[t, :, : 3 * size].sigmoid_()
            candidate.tanh_()
            torch.mul(keep, cell[before], out=cell[after]).addcmul_(enter, candidate)
            torch.tanh(cell[after], out=shown[k])
            torch.mul(leave, shown[k], out=fed_back[t + 1, :, num_read:])
            torch.addmm(head_bias, fed_back[t + 1, :, num_read:], head_weight_turned, out=requested[k])
            kernel.access_memory_forward(
                np_requested[k],
                np_memory[before],
                np_weightings[before],
                sizes.num_read_heads,
                sizes.num_shifts,
                np_weightings[after],
                np_memory[after],
                np_read[t],
                np_kept[k],
            )
            np_fed_back[t + 1, :, :num_read] = np_read[t].reshape(batch, num_read)
        if is_recorded:
            ctx.save_for_backward(
                inputs, weight, head_weight, memory, weightings, fed_back, cell, shown, gates, requested, kept
            )
            ctx.sizes = sizes
        last = num_steps % num_states
        ends = memory[last].clone(), weightings[last].clone(), cell[last].clone()
        return fed_back[1:, :, num_read:].clone(), read.flatten(2), *ends

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_hidden: Tensor,
        grad_read: Tensor,
        grad_last_memory: Tensor,
        grad_last_weightings: Tensor,
        grad_last_cell: Tensor,
    ) -> tuple[Tensor | None, ...]:
        inputs, weight, head_weight, memory, weightings, fed_back, cell, shown, gates, requested, kept = (
            ctx.saved_tensors
        )
        sizes: HeadSizes = ctx.sizes
        num_steps, batch, input_size = inputs.shape
        size = cell.shape[2]
        num_read = fed_back.shape[2] - size
        back_weight = weight[:, input_size:].contiguous()
        grad_gates, grad_requested = torch.empty_like(gates), torch.empty_like(requested)
        # What one step hands to the one before it; memory and weightings in turn in one of two places.
        grad_memory = torch.empty_like(memory[:2])
        grad_weightings = torch.empty_like(weightings[:2])
        last = (num_steps - 1) % 2
        grad_memory[last], grad_weightings[last] = grad_last_memory, grad_last_weightings
        grad_cell = grad_last_cell.clone(memory_format=torch.contiguous_format)
        grad_fed_back = torch.zeros_like(fed_back[0])
        grad_both = torch.cat([grad_read, grad_hidden], dim=-1)
        grad_now = torch.empty_like(fed_back[0])
        np_memory, np_weightings, np_cell, np_shown, np_gates = _arrays(
            memory, weightings, cell, shown, gates
        )
        np_requested, np_kept, np_grad_now, np_grad_cell = _arrays(requested, kept, grad_now, grad_cell)
        np_grad_gates, np_grad_requested, np_grad_memory, np_grad_weightings = _arrays(
            grad_gates, grad_requested, grad_memory, grad_weightings
        )
        for t in reversed(range(num_steps)):
            now, before = t % 2, (t + 1) % 2
            torch.add(grad_both[t], grad_fed_back, out=grad_now)
            grad_read_now = np.ascontiguousarray(np_grad_now[:, :num_read])
            kernel.access_memory_backward(
                np_requested[t],
                np_memory[t],
                np_weightings[t],
                sizes.num_read_heads,
                sizes.num_shifts,
                np_weightings[t + 1],
                np_memory[t + 1],
                np_kept[t],
                np_grad_weightings[now],
                np_grad_memory[now],
                grad_read_now.reshape(batch, sizes.num_read_heads, sizes.row_width),
                np_grad_requested[t],
                np_grad_memory[before],
                np_grad_weightings[before],
            )
            grad_now[:, num_read:].addmm_(grad_requested[t], head_weight)
            _lstm_backward(
                np_gates[t], np_cell[t], np_shown[t], np_grad_now, num_read, np_grad_cell, np_grad_gates[t]
            )
            torch.mm(grad_gates[t], back_weight, out=grad_fed_back)

        flat_gates, flat_requested = grad_gates.flatten(0, 1), grad_requested.flatten(0, 1)
        grad_weight = torch.empty_like(weight)
        torch.mm(flat_gates.T, inputs.reshape(-1, input_size), out=grad_weight[:, :input_size])
        torch.mm(flat_gates.T, fed_back[:-1].flatten(0, 1), out=grad_weight[:, input_size:])
        grad_head_weight = flat_requested.T @ fed_back[1:, :, num_read:].reshape(-1, size)
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (flat_gates @ weight[:, :input_size]).view_as(inputs)
        first = 1  # Where step 0 left them.
        return (
            grad_inputs,
            grad_weight,
            flat_gates.sum(dim=0),
            grad_head_weight,
            flat_requested.sum(dim=0),
            grad_memory[first],
            grad_weightings[first],
            grad_fed_back[:, :num_read].reshape(batch, sizes.num_read_heads, sizes.row_width),
            grad_fed_back[:, num_read:],
            grad_cell,
            None,
            None,
        )


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]


@compiled
def _lstm_backward(gates, cell, shown, grad_now, num_read, grad_cell, grad_gates):  # type: ignore[no-untyped-def]
    """From the gradient of the hidden state, in columns `num_read` and on of `grad_now`, and that of the next cell,
    in `grad_cell`, to those of the gates' sums and, in its place, of the cell state."""
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
            grad_hidden = grad_now[b, num_read + i]
            total = grad_cell[b, i] + grad_hidden * leave * (one - shown[b, i] * shown[b, i])
            grad_gates[b, i] = total * candidate * enter * (one - enter)
            grad_gates[b, size + i] = total * cell[b, i] * keep * (one - keep)
            grad_gates[b, 2 * size + i] = grad_hidden * shown[b, i] * leave * (one - leave)
            grad_gates[b, 3 * size + i] = total * enter * (one - candidate * candidate)
            grad_cell[b, i] = total * keep
