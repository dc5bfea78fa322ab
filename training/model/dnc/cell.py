"""The cell: one step of a Differentiable Neural Computer, and the state a sequence starts from.

It has the interface of `training.model.cell.NTMCell`, so that it is trained, exported and served by the same code.

Shapes: B batch, I input size, O output size, N memory rows, M row width, R read heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.model.controller import Controller, ControllerKind
from training.model.dnc.access import Accessed, access_memory
from training.model.dnc.heads import DNCHeads, DNCSizes, Improvements
from training.model.state import DNCState

AccessMemory = Callable[[Tensor, Accessed, DNCSizes], Accessed]
"""As `access.access_memory`."""


class DNCCell(nn.Module):
    """A Differentiable Neural Computer as a function from an input and a state to an output and the next state.

    Args:
        input_size: numbers in an input.
        output_size: numbers in an output.
        memory_rows: N. The links between them are N x N numbers of every sequence.
        row_width: M.
        controller: which network decides.
        controller_size: units in a layer of it.
        controller_layers: its layers, each fed by the one below.
        controller_scale: its recurrent weights are drawn from U(±scale / √(inputs + units)).
        forget_bias: of an LSTM's forget gates at the start.
        num_read_heads: R, at least 1.
        improvements: which of those of Csordás and Schmidhuber it has.
    """

    def __init__(
        self,
        *,
        input_size: int,
        output_size: int,
        memory_rows: int = 32,
        row_width: int = 20,
        controller: ControllerKind = "lstm",
        controller_size: int = 100,
        controller_layers: int = 1,
        controller_scale: float = 1.0,
        forget_bias: float = 0.0,
        num_read_heads: int = 1,
        improvements: Improvements = Improvements(),  # noqa: B008 (a NamedTuple does not change)
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.memory_rows = memory_rows
        read_size = num_read_heads * row_width
        self.controller = Controller(
            controller,
            input_size + read_size,
            controller_size,
            controller_layers,
            controller_scale,
            forget_bias,
        )
        self.heads = DNCHeads(controller_size, DNCSizes(num_read_heads, row_width, improvements))
        self.output = nn.Linear(controller_size + read_size, output_size)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.normal_(self.output.bias, std=0.01)

    def with_memory_rows(self, memory_rows: int) -> DNCCell:
        """The same machine over a memory of another size; a copy. Nothing that it has learned is about single rows."""
        resized = copy.copy(self)
        resized.memory_rows = memory_rows
        return resized

    def initial_state(self, batch_size: int, memory_rows: int | None = None) -> DNCState:
        """The state every sequence starts from: nothing is written, all is free; over as many rows as are asked for."""
        sizes, rows = self.heads.sizes, self.memory_rows if memory_rows is None else memory_rows

        def zeros(*shape: int) -> Tensor:
            return self.output.weight.new_zeros(batch_size, *shape)

        return DNCState(
            memory=zeros(sizes.row_width, rows),
            usage=zeros(rows),
            write_weightings=zeros(1, rows),
            precedence=zeros(rows),
            links=zeros(rows, rows),
            read_weightings=zeros(sizes.num_read_heads, rows),
            read_vectors=zeros(sizes.num_read_heads, sizes.row_width),
            controller=self.controller.initial_state(batch_size),
        )

    def step(
        self, inputs: Tensor, state: DNCState, access: AccessMemory = access_memory
    ) -> tuple[Tensor, DNCState]:
        """One time step.

        Under autocast the memory is addressed, written and read in float32 all the same: its floors are too small for
        float16.

        Args:
            inputs: [B, I].
            state: what the last step returned, or `initial_state`.
            access: what addresses, writes and reads the memory, such as the compiled `kernel.compiled_access`.

        Returns:
            [B, O] the output as logits, and the next state.
        """
        controlled, controller_state = self.controller.step(
            [inputs, state.read_vectors.flatten(1)], state.controller
        )
        *before, _ = state
        requested = self.heads(controlled)
        if torch.is_autocast_enabled(requested.device.type):
            with torch.autocast(requested.device.type, enabled=False):
                found = Accessed(*(tensor.float() for tensor in before))
                accessed = access(requested.float(), found, self.heads.sizes)
        else:
            accessed = access(requested, Accessed(*before), self.heads.sizes)
        outputs = self.output(torch.cat([controlled, accessed.read_vectors.flatten(1)], dim=-1))
        return outputs, DNCState(*accessed, controller=controller_state)
