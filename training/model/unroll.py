"""Unrolling: run a cell over a sequence, for training and evaluation.

Shapes: T steps, B batch, I input size, O output size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.model import fused_unroll, kernel
from training.model.cell import NTMCell
from training.model.plain import PlainCell

Cell = NTMCell | PlainCell


def unroll(cell: Cell, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Feed a sequence to the cell, one step after the other.

    Args:
        cell: the cell.
        inputs: [T, B, I].
        state: where to start; the cell's initial state if not given.

    Returns:
        [T, B, O] the outputs as logits, and the state after the last step.
    """
    if state is None:
        state = cell.initial_state(inputs.shape[1])
    outputs = []
    for step_inputs in inputs:
        step_outputs, state = cell.step(step_inputs, state)
        outputs.append(step_outputs)
    return torch.stack(outputs), state


class Unrolled(nn.Module):
    """A cell as a function of whole sequences, from [T, B, I] to logits [T, B, O]: what training runs.

    Args:
        cell: the cell.
        is_compiled: use `kernel.py` and `fused_unroll.py`, which are for float32 on a CPU. The cell then steps by
            the kernel, too.
    """

    def __init__(self, cell: Cell, *, is_compiled: bool) -> None:
        super().__init__()
        self.cell = cell
        if is_compiled and isinstance(cell, NTMCell):
            cell.access = kernel.compiled_access
        self._is_fused = is_compiled and fused_unroll.can_fuse(cell)

    def forward(self, inputs: Tensor) -> Tensor:
        """All outputs, from the initial state on."""
        if self._is_fused:
            return fused_unroll.unroll_fused(self.cell, inputs)
        return unroll(self.cell, inputs)[0]
