"""The layer: a cell as a module of whole sequences, to stand in anybody's network as `torch.nn.LSTM` does.

`NTM` is the machine as a layer, `RecurrentLayer` any cell as one; training runs cells by it too. No settings and no
task are needed. `unroll.py` does the steps; here sequences come in the ways in which torch has them: batch first or
not, alone, packed, of unequal lengths.

Shapes: T steps, B batch, I input size, O output size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from training.model.cell import InitialAttention, InitialMemory, NTMCell
from training.model.controller import ControllerKind
from training.model.state import named_tensors, with_tensors
from training.model.unroll import Cell, unroll


class RecurrentLayer(nn.Module):
    """A cell as a function of whole sequences, of any length.

    On a CPU, in float32 or float64, the compiled operations of `kernel.py` and `fused_unroll.py` do the work, whose
    gradients are those of torch's operations. On other devices, under autocast and `torch.compile`, torch's do.

    Args:
        cell: the cell.
        batch_first: sequences are [B, T, ...] and not [T, B, ...].
        use_kernel: use the compiled operations where they apply. Without them there are second derivatives.
    """

    def __init__(self, cell: Cell, *, batch_first: bool = False, use_kernel: bool = True) -> None:
        super().__init__()
        self.cell = cell
        self.batch_first = batch_first
        self.use_kernel = use_kernel

    def forward(
        self, inputs: Tensor | PackedSequence, state: Any = None, lengths: Tensor | list[int] | None = None
    ) -> tuple[Any, Any]:
        """All outputs, and the state after the last step.

        Args:
            inputs: [T, B, I], or [B, T, I] if `batch_first`, or [T, I] for one sequence alone, or packed by
                `torch.nn.utils.rnn`.
            state: where to start, as returned by this; the learned start of every sequence if not given. Of one
                sequence alone it has no batch axis; its rows are in the order of the batch, also where it is packed.
            lengths: [B], how many steps of each sequence count, each at least 1; all if not given. Not with packed
                inputs, which have lengths of their own.

        Returns:
            The outputs, in the form of the inputs, as they leave the last linear map: with no sigmoid. After the end
            of a sequence that is shorter than others they are 0. And the state, for each sequence after its own end.

        Raises:
            ValueError: the inputs, lengths or state do not fit.
        """
        if isinstance(inputs, PackedSequence):
            if lengths is not None:
                raise ValueError("packed inputs have lengths of their own: leave lengths out")
            return self._of_packed(inputs, state)
        if inputs.dim() == 2:
            if lengths is not None:
                raise ValueError("one sequence alone has one length: leave lengths out")
            start = None if state is None else _each(state, lambda tensor: tensor.unsqueeze(0))
            outputs, end = self._of_steps(inputs.unsqueeze(1), start)
            return outputs.squeeze(1), _each(end, lambda tensor: tensor.squeeze(0))
        if lengths is not None:
            return self._of_lengths(inputs, state, lengths)
        if not self.batch_first:
            return self._of_steps(inputs, state)
        outputs, end = self._of_steps(inputs.transpose(0, 1), state)
        return outputs.transpose(0, 1), end

    def step(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step, [B, I] to [B, O] and the next state: what is exported and served."""
        return self.cell.step(inputs, state)

    def initial_state(self, batch_size: int) -> Any:
        """The state every sequence starts from, the same in every row of the batch."""
        return self.cell.initial_state(batch_size)

    def extra_repr(self) -> str:
        """Sizes, for people."""
        return f"{self.cell.input_size}, {self.cell.output_size}, batch_first={self.batch_first}"

    def _of_steps(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        return unroll(self.cell, inputs, state, is_compiled=self.use_kernel and _is_for_kernel(inputs))

    def _of_lengths(self, inputs: Tensor, state: Any, lengths: Tensor | list[int]) -> tuple[Tensor, Any]:
        steps, batch = (1, 0) if self.batch_first else (0, 1)
        counts = torch.as_tensor(lengths, dtype=torch.long, device="cpu")
        most = inputs.shape[steps]
        if counts.shape != inputs.shape[batch : batch + 1] or not bool(
            ((counts >= 1) & (counts <= most)).all()
        ):
            raise ValueError(
                f"lengths must be {inputs.shape[batch]} numbers from 1 to {most}, not {counts.tolist()}"
            )
        packed = pack_padded_sequence(inputs, counts, batch_first=self.batch_first, enforce_sorted=False)
        outputs, end = self._of_packed(packed, state)
        padded, _ = pad_packed_sequence(outputs, batch_first=self.batch_first, total_length=most)
        return padded, end

    def _of_packed(self, inputs: PackedSequence, state: Any) -> tuple[PackedSequence, Any]:
        """Rows stand by length, the longest first, so that those still running are always the first ones: they run side
        by side until the next of them ends."""
        data, batch_sizes, order, order_back = inputs
        if state is None:
            state = self.cell.initial_state(int(batch_sizes[0]))
        elif order is not None:
            state = _each(state, lambda tensor: tensor.index_select(0, order))
        num_rows, num_steps = torch.unique_consecutive(batch_sizes, return_counts=True)
        outputs: list[Tensor] = []
        ended: list[Any] = []
        first = 0
        for rows, steps in zip(num_rows.tolist(), num_steps.tolist(), strict=True):
            if outputs:
                ended.append(_each(state, lambda tensor: tensor[rows:]))  # noqa: B023
                state = _each(state, lambda tensor: tensor[:rows])  # noqa: B023
            part = data[first : first + rows * steps].view(steps, rows, -1)
            of_part, state = self._of_steps(part, state)
            outputs.append(of_part.flatten(0, 1))
            first += rows * steps
        end = _joined([state, *reversed(ended)])
        if order_back is not None:
            end = _each(end, lambda tensor: tensor.index_select(0, order_back))
        return PackedSequence(torch.cat(outputs), batch_sizes, order, order_back), end


class NTM(RecurrentLayer):
    """A Neural Turing Machine as a layer: `outputs, state = ntm(inputs)`.

    Args:
        input_size: numbers in an input, I.
        output_size: numbers in an output, O.
        memory_rows: rows of the memory, N.
        row_width: numbers in a row, M.
        controller: which network decides.
        controller_size: units in a layer of it.
        controller_layers: its layers, each fed by the one below.
        controller_scale: its recurrent weights are drawn from U(±scale / √(inputs + units)).
        forget_bias: of an LSTM's forget gates at the start; less than 0 leaves remembering to the memory.
        num_read_heads: at least 1.
        num_write_heads: at least 1.
        shift_reach: how far a head can move its attention in one step, in rows; 0 leaves it to content.
        initial_memory: what a sequence finds in the memory: "constant", "learned", or "random", drawn once.
        initial_attention: where the heads are at the start: "constant", all on row 0, or "learned".
        batch_first: sequences are [B, T, ...] and not [T, B, ...].
        use_kernel: see `RecurrentLayer`.
        device: of the weights.
        dtype: of the weights.
    """

    cell: NTMCell

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        memory_rows: int = 128,
        row_width: int = 20,
        controller: ControllerKind = "lstm",
        controller_size: int = 100,
        controller_layers: int = 1,
        controller_scale: float = 5.0,
        forget_bias: float = 0.0,
        num_read_heads: int = 1,
        num_write_heads: int = 1,
        shift_reach: int = 1,
        initial_memory: InitialMemory = "constant",
        initial_attention: InitialAttention = "constant",
        batch_first: bool = False,
        use_kernel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cell = NTMCell(
            input_size=input_size,
            output_size=output_size,
            memory_rows=memory_rows,
            row_width=row_width,
            controller=controller,
            controller_size=controller_size,
            controller_layers=controller_layers,
            controller_scale=controller_scale,
            forget_bias=forget_bias,
            num_read_heads=num_read_heads,
            num_write_heads=num_write_heads,
            shift_reach=shift_reach,
            initial_memory=initial_memory,
            initial_attention=initial_attention,
        )
        super().__init__(cell.to(device, dtype), batch_first=batch_first, use_kernel=use_kernel)


def detach_state(state: Any) -> Any:
    """The same state, of which no gradient flows back: between parts of a sequence that are trained one by one."""
    return _each(state, Tensor.detach)


def _is_for_kernel(inputs: Tensor) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _each(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A state with the function's result in place of each tensor."""
    return with_tensors(state, {name: function(tensor) for name, tensor in named_tensors(state).items()})


def _joined(states: list[Any]) -> Any:
    """States of some rows each to one of all rows."""
    named = [named_tensors(state) for state in states]
    return with_tensors(states[0], {name: torch.cat([part[name] for part in named]) for name in named[0]})
