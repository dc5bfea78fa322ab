"""Unrolling: run a cell over a sequence, for training and evaluation.

Shapes: T steps, B batch, I input size, O output size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.model.cell import NTMCell
from training.model.state import NTMState


def unroll(cell: NTMCell, inputs: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMState]:
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
