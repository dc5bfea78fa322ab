"""Unrolling: run a cell over a sequence, for training and evaluation.

Shapes: T steps, B batch, I input size, O output size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.model import fused_unroll, kernel
from training.model.cell import NTMCell
from training.model.dnc import kernel as dnc_kernel
from training.model.dnc.cell import DNCCell
from training.model.plain import PlainCell
from training.model.state import DNCState, NTMState, named_tensors

Cell = NTMCell | DNCCell | PlainCell
_COMPILED: dict[type, Any] = {NTMCell: kernel.compiled_access, DNCCell: dnc_kernel.compiled_access}


def unroll(cell: Cell, inputs: Tensor, state: Any = None, *, is_compiled: bool = False) -> tuple[Tensor, Any]:
    """Feed a sequence to the cell, one step after the other.

    Args:
        cell: the cell.
        inputs: [T, B, I].
        state: where to start; the cell's initial state if not given.
        is_compiled: use `kernel.py` and, where there is an operation for the cell, `fused_unroll.py`: on a CPU, for
            tensors of one dtype, float32 or float64. They give the same outputs and all the same gradients, to within
            rounding, but no second derivatives.

    Returns:
        [T, B, O] the outputs as logits, and the state after the last step.

    Raises:
        ValueError: the inputs do not fit the cell or the state, or `is_compiled` is not for them.
    """
    _check_inputs(cell, inputs)
    if state is None:
        state = cell.initial_state(inputs.shape[1])
    else:
        _check_state(cell, inputs, state)
    if is_compiled:
        _check_compilable(inputs)
        if fused_unroll.can_fuse(cell):
            return fused_unroll.unroll_fused(cell, inputs, state)
    access = {"access": _COMPILED[type(cell)]} if is_compiled and type(cell) in _COMPILED else {}
    first, state = cell.step(inputs[0], state, **access)
    if torch.is_grad_enabled():
        outputs = [first]
        for step_inputs in inputs[1:]:
            step_outputs, state = cell.step(step_inputs, state, **access)
            outputs.append(step_outputs)
        return torch.stack(outputs), state
    # All outputs in one place from the start: small tensors that outlive a step keep the allocator from giving back
    # what the step needed. At N = 1024 and a batch of 64 a process grew by 0.5 MB a step.
    filled = first.new_empty(len(inputs), *first.shape)
    filled[0] = first
    for t in range(1, len(inputs)):
        filled[t], state = cell.step(inputs[t], state, **access)
    return filled, state


def _check_inputs(cell: Cell, inputs: Tensor) -> None:
    if inputs.dim() != 3 or inputs.shape[2] != cell.input_size or 0 in inputs.shape:
        raise ValueError(
            f"inputs are {list(inputs.shape)}: a cell takes [steps, batch, {cell.input_size}], the steps first, "
            "and at least one of each"
        )
    dtype, device = cell.output.weight.dtype, cell.output.weight.device
    if inputs.dtype != dtype and not torch.is_autocast_enabled(inputs.device.type):
        raise ValueError(f"inputs are {inputs.dtype} and the cell {dtype}: convert one by .to(dtype)")
    if inputs.device != device:
        raise ValueError(f"inputs are on {inputs.device} and the cell on {device}: move one by .to(device)")


def _check_state(cell: Cell, inputs: Tensor, state: Any) -> None:
    expected = named_tensors(_start_like(cell, inputs.shape[1], state))
    for name, tensor in named_tensors(state).items():
        if name not in expected or tensor.shape != expected[name].shape:
            wanted = list(expected[name].shape) if name in expected else "no such tensor"
            raise ValueError(
                f"the state's {name} is {list(tensor.shape)}, and for inputs {list(inputs.shape)}, "
                f"[steps, batch, size], the cell takes {wanted}"
            )


def _start_like(cell: Cell, batch_size: int, state: Any) -> Any:
    """A start over as many memory rows as a state has, where the cell can work with so many."""
    if not isinstance(cell, PlainCell) and isinstance(state, NTMState | DNCState):
        try:
            return cell.initial_state(batch_size, state.memory.shape[-1])
        except ValueError:
            pass
    return cell.initial_state(batch_size)


def _check_compilable(inputs: Tensor) -> None:
    if torch.is_autocast_enabled(inputs.device.type):
        raise ValueError("the compiled operations are not for autocast: leave is_compiled out")
    if inputs.device.type != "cpu" or inputs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "the compiled operations are for float32 and float64 on a CPU, "
            f"not {inputs.dtype} on {inputs.device}: leave is_compiled out"
        )
