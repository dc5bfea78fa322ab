"""Access as ONNX Runtime runs it best: the function of `training/model/access.py`, in fewer and cheaper operations.

A step is exported from a cell whose heads and access are these. What differs:

- the linear map of the heads gives its numbers in the order in which they are used, not head by head, and constants
  among them, by weights of zero: a softplus is then one LogSumExp of pairs. One write head's a it gives as -a;
- the write goes over the memory fewer times: one head's three times in place of five, M - w (e M - a); where there are
  several, what each keeps comes out of one matrix product, e w - 1;
- attention of 0 has a logarithm of minus infinity, and stays 0: only a gradient needs a floor.

`verification.py` holds what is exported to the cell as it was trained; `benchmarks/step_graph.py` measures it.

Shapes: B batch, H heads (R read heads, then W write heads), N memory rows, M row width, S shift positions, P numbers
that the heads ask for, Q those and the constants.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model import NTMCell
from training.model.access import Accessed
from training.model.addressing import focus_by_content, interpolate, shift
from training.model.heads import Heads, HeadSizes, rows_of
from training.model.memory import each_head, read


def for_onnx_runtime(module: nn.Module) -> nn.Module:
    """The same module, every machine in it with these heads and this access; a copy, and one without as it is."""
    if not any(isinstance(cell, NTMCell) for cell in module.modules()):
        return module
    module = copy.deepcopy(module)
    for cell in module.modules():
        if isinstance(cell, NTMCell):
            _spread(cell.heads)
            cell.access = access_in_onnx_runtime
    return module


def access_in_onnx_runtime(requested: Tensor, memory: Tensor, previous: Tensor, sizes: HeadSizes) -> Accessed:
    """As `training.model.access.access_memory`, but for what is requested.

    Args:
        requested: [B, Q], from heads that are spread.
        memory: [B, M, N].
        previous: [B, H, N], the heads' weightings of the last step, each row summing to 1.
        sizes: how many heads of what size.
    """
    num_heads, num_write, width = sizes.num_heads, sizes.num_write_heads, sizes.row_width
    key, kernel, pairs, opened, added = torch.split(requested, _num_of_each(sizes), dim=-1)
    positive = torch.logsumexp(pairs.reshape(-1, 2 * num_heads, 2), dim=-1, keepdim=True)
    strength, sharpness = torch.split(positive, num_heads, dim=1)
    gate, erase = torch.split(torch.sigmoid(opened), [num_heads, num_write * width], dim=-1)

    by_content = focus_by_content(key.reshape(-1, num_heads, width), strength, memory)
    gated = interpolate(by_content, previous, gate.reshape(-1, num_heads, 1))
    shifted = shift(gated, torch.softmax(kernel.reshape(-1, num_heads, 1, sizes.num_shifts), dim=-1))
    weightings = torch.softmax(sharpness * shifted.log(), dim=-1)  # eq. 9
    reading, writing = torch.split(weightings, [sizes.num_read_heads, num_write], dim=1)
    if num_write == 1:
        written = write_by_one_head(memory, writing, erase.flatten(), taken=added.flatten())
    else:
        written = write(
            memory, writing, erase.reshape(-1, num_write, width), added.reshape(-1, width, num_write)
        )
    return Accessed(weightings, written, read(written, reading))


def write_by_one_head(memory: Tensor, weightings: Tensor, erase: Tensor, taken: Tensor) -> Tensor:
    """Erase and add at once (eq. 3 and 4).

    Of a row of which all is erased a rounding error of what was in it stays.

    Args:
        memory: [B, M, N].
        weightings: [B, 1, N], summing to 1.
        erase: [B M], in [0, 1].
        taken: -a, [B M].

    Returns:
        [B, M, N].
    """
    _, width, num_rows = memory.shape
    # e M - a is one pass as a batch normalisation, of mean 0 and variance 0 with an epsilon of 1, and would be two as
    # a product and a sum.
    nothing = (0.0 * erase).detach()  # a mean may not ask for a gradient
    lost = F.batch_norm(memory.reshape(1, -1, num_rows), nothing, nothing, erase, taken, eps=1.0)
    return memory - weightings * lost.reshape(-1, width, num_rows)


def write(memory: Tensor, weightings: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Erase, then add (eq. 3 and 4), by several heads.

    Args:
        memory: [B, M, N].
        weightings: [B, W, N], each row summing to 1.
        erase: [B, W, M], in [0, 1].
        add: [B, M, W].

    Returns:
        [B, M, N].
    """
    kept, num_write = memory, weightings.shape[1]
    for erased, attention in zip(each_head(erase, 1), each_head(weightings, 1), strict=True):
        # Minus what is kept: (e, 1) (w, -1) = e w - 1.
        kept = kept * (_with_row_of(1.0, erased).mT @ _with_row_of(-1.0, attention))
    added = add @ weightings
    return added - kept if num_write % 2 else added + kept


def _num_of_each(sizes: HeadSizes) -> list[int]:
    """How many of the Q numbers are keys, kernels, pairs for a softplus each, for a sigmoid, and a or -a."""
    num_heads, num_written = sizes.num_heads, sizes.num_write_heads * sizes.row_width
    return [
        num_heads * sizes.row_width,
        num_heads * sizes.num_shifts,
        2 * 2 * num_heads,
        num_heads + num_written,
        num_written,
    ]


@torch.no_grad()
def _spread(heads: Heads) -> None:
    """Have the heads' linear map give [B, Q] in place of [B, P], in the order of `_num_of_each`."""
    order, constants, signs = _arrangement(heads.sizes)
    heads.weight = nn.Parameter(F.pad(heads.weight, (0, 0, 0, 1))[order] * signs.unsqueeze(1))
    heads.bias = nn.Parameter((F.pad(heads.bias, (0, 1))[order] + constants) * signs)
    heads.out_features = len(order)


def gather(weight: Tensor, bias: Tensor, sizes: HeadSizes) -> tuple[Tensor, Tensor]:
    """The linear map of heads as it was before it was spread: the inverse, within rounding."""
    order, constants, signs = _arrangement(sizes)
    places = torch.stack([(order == row).nonzero()[0, 0] for row in range(sizes.num_requested)])
    signs, constants = signs[places], constants[places]
    return weight[places] * signs.unsqueeze(1), bias[places] * signs - constants


def _arrangement(sizes: HeadSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the P numbers each of the Q is (the last one, P, is 0), what is added to it, and its sign: [Q] each."""
    rows = rows_of(sizes)
    nothing = torch.full_like(rows.strength, sizes.num_requested)  # a row of zeros behind the others
    parts = [
        (rows.key, 0),
        (rows.kernel, 0),
        (torch.cat([nothing, rows.strength], dim=1), 0),  # log(exp(0) + exp(x)) = softplus(x)
        (torch.cat([nothing, rows.sharpness], dim=1), 1),  # log(exp(1) + exp(1 + x)) = 1 + softplus(x)
        (rows.gate, 0),
        (rows.erase.T, 0),
        (rows.add, 0),
    ]
    order = torch.cat([part.flatten() for part, _ in parts])
    constants = torch.cat([torch.full([part.numel()], float(constant)) for part, constant in parts])
    signs = torch.ones(len(order))
    if sizes.num_write_heads == 1:  # -a in place of a
        signs[-sizes.row_width :] = -1
    return order, constants, signs


def _with_row_of(number: float, row: Tensor) -> Tensor:
    """[B, 1, L] to [B, 2, L]."""
    return F.pad(row, (0, 0, 0, 1), value=number)
