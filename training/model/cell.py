"""The cell: one step of the whole machine, and the state a sequence starts from.

Nothing is kept on `self` between steps: the same cell is unrolled in training, exported as a graph and served
to many sessions at once.

The order within a step: all heads address the memory as the last step left it, then the write heads write,
then the read heads read what is now there (eq. 2 with M_t, eq. 3 with M_{t-1}).

Shapes: B batch, I input size, O output size, N memory rows, M row width, R read heads, W write heads, H = R + W.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from training.model.access import Accessed, access_memory
from training.model.controller import Controller, ControllerKind
from training.model.dnc.cell import DNCCell
from training.model.heads import Heads, HeadSizes
from training.model.state import NTMState

InitialMemory = Literal["constant", "learned", "random"]
InitialAttention = Literal["constant", "learned"]
AccessMemory = Callable[[Tensor, Tensor, Tensor, HeadSizes], Accessed]
"""As `access.access_memory`."""


class NTMCell(nn.Module):
    """A Neural Turing Machine as a function from an input and a state to an output and the next state.

    Args:
        input_size: numbers in an input.
        output_size: numbers in an output.
        memory_rows: N.
        row_width: M.
        controller: which network decides.
        controller_size: units in a layer of it.
        controller_layers: its layers, each fed by the one below.
        controller_scale: its recurrent weights are drawn from U(±scale / √(inputs + units)).
        forget_bias: of an LSTM's forget gates at the start.
        num_read_heads: R, at least 1.
        num_write_heads: W, at least 1.
        shift_reach: how far a head can move its attention in one step, in rows; 0 leaves it to content.
        initial_memory: "constant" (every element 1e-6), "learned", or "random": drawn when the cell is made
            and the same for every sequence from then on, so that two sessions start alike.
        initial_attention: "learned": the first weightings and read vectors are, starting from even attention;
            "constant": every head is on row 0 and has read zeros.
    """

    def __init__(
        self,
        *,
        input_size: int,
        output_size: int,
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
        initial_memory: InitialMemory = "random",
        initial_attention: InitialAttention = "learned",
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.num_read_heads = num_read_heads
        self.num_write_heads = num_write_heads
        read_size = num_read_heads * row_width
        self.controller = Controller(
            controller,
            input_size + read_size,
            controller_size,
            controller_layers,
            controller_scale,
            forget_bias,
        )
        self.heads = Heads(
            controller_size, HeadSizes(num_read_heads, num_write_heads, row_width, shift_reach)
        )
        # Export puts its own in its place.
        self.access: AccessMemory = access_memory
        self.output = nn.Linear(controller_size + read_size, output_size)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.normal_(self.output.bias, std=0.01)

        # A tensor of the start is a parameter if it is learned, else a buffer: saved with the weights,
        # left alone by the optimiser.
        scale = 1 / math.sqrt(memory_rows + row_width)
        drawn = torch.empty(memory_rows, row_width).uniform_(-scale, scale)
        if initial_memory == "constant":
            drawn = torch.full_like(drawn, 1e-6)
        self.initial_memory = _start(drawn, is_learned=initial_memory == "learned")
        is_learned = initial_attention == "learned"
        num_heads = num_read_heads + num_write_heads
        logits = torch.zeros(num_heads, memory_rows) if is_learned else _on_row_0(num_heads, memory_rows)
        self.initial_attention_logits = _start(logits, is_learned)
        vectors = (
            torch.randn(num_read_heads, row_width) * 0.01
            if is_learned
            else torch.zeros(num_read_heads, row_width)
        )
        self.initial_read_vectors = _start(vectors, is_learned)

    def initial_state(self, batch_size: int, memory_rows: int | None = None) -> NTMState:
        """The state every sequence starts from, the same in every row of the batch.

        Nothing that the machine has learned says how many rows there are: keys, shifts and gates come from the
        controller. Only the start is given row by row, and can be given for any number of rows if all are alike; the
        steps then go on with as many.

        Args:
            batch_size: sequences.
            memory_rows: of the memory; N if not given.

        Raises:
            ValueError: the start has values for each row, or the memory is too small for the heads' shifts.
        """
        memory, logits = self.start(len(self.initial_memory) if memory_rows is None else memory_rows)
        weightings = torch.softmax(logits, dim=-1)
        read_weightings, write_weightings = torch.split(
            weightings, [self.num_read_heads, self.num_write_heads]
        )
        return NTMState(
            memory=memory.mT.expand(batch_size, -1, -1),
            read_weightings=read_weightings.expand(batch_size, -1, -1),
            write_weightings=write_weightings.expand(batch_size, -1, -1),
            read_vectors=self.initial_read_vectors.expand(batch_size, -1, -1),
            controller=self.controller.initial_state(batch_size),
        )

    def start(self, memory_rows: int) -> tuple[Tensor, Tensor]:
        """The first memory [N, M] and the logits [H, N] of the first attention, for any N; see `initial_state`."""
        memory, logits = self.initial_memory, self.initial_attention_logits
        if memory_rows == len(memory):
            return memory, logits
        least = self.heads.sizes.num_shifts
        if memory_rows < least:
            raise ValueError(f"heads that reach so far need at least {least} rows")
        if isinstance(memory, nn.Parameter):
            raise ValueError(
                "the memory at the start is learned for each row; train with initial_memory constant"
            )
        if not (memory == memory[:1]).all():
            raise ValueError(
                "the memory at the start is drawn for each row; train with initial_memory constant"
            )
        if isinstance(logits, nn.Parameter):
            raise ValueError(
                "the first attention is learned for each row; train with initial_attention constant"
            )
        return memory[:1].repeat(memory_rows, 1), _on_row_0(len(logits), memory_rows).to(logits)

    def step(
        self, inputs: Tensor, state: NTMState, access: AccessMemory | None = None
    ) -> tuple[Tensor, NTMState]:
        """One time step.

        Under autocast the memory is addressed, written and read in float32 all the same: its floors are too small for
        float16.

        Args:
            inputs: [B, I].
            state: what the last step returned, or `initial_state`.
            access: what addresses, writes and reads the memory, such as the compiled `kernel.compiled_access`; the
                cell's own if not given.

        Returns:
            [B, O] the output as logits, and the next state.
        """
        controlled, controller_state = self.controller.step(
            [inputs, state.read_vectors.flatten(1)], state.controller
        )
        previous = torch.cat([state.read_weightings, state.write_weightings], dim=1)
        requested = self.heads(controlled)
        access = access or self.access
        if torch.is_autocast_enabled(requested.device.type):
            access = _in_full_precision(access)
        accessed = access(requested, state.memory, previous, self.heads.sizes)
        read_weightings, write_weightings = torch.split(
            accessed.weightings, [self.num_read_heads, self.num_write_heads], dim=1
        )
        outputs = self.output(torch.cat([controlled, accessed.read_vectors.flatten(1)], dim=-1))
        return outputs, NTMState(
            accessed.memory, read_weightings, write_weightings, accessed.read_vectors, controller_state
        )


def with_memory_rows(cell: NTMCell | DNCCell, memory_rows: int) -> NTMCell | DNCCell:
    """A copy of the machine that starts over a memory of another size; see `NTMCell.initial_state`.

    Raises:
        ValueError: the start has values for each row, or the memory is too small for the heads' shifts.
    """
    if isinstance(cell, DNCCell):
        return cell.with_memory_rows(memory_rows)
    memory, logits = cell.start(memory_rows)
    resized = copy.deepcopy(cell)
    if memory_rows != len(cell.initial_memory):
        resized.initial_memory, resized.initial_attention_logits = nn.Buffer(memory), nn.Buffer(logits)
    return resized


def _in_full_precision(access: AccessMemory) -> AccessMemory:
    def access_in_full_precision(
        requested: Tensor, memory: Tensor, previous: Tensor, sizes: HeadSizes
    ) -> Accessed:
        with torch.autocast(requested.device.type, enabled=False):
            return access(requested.float(), memory.float(), previous.float(), sizes)

    return access_in_full_precision


def _start(value: Tensor, is_learned: bool) -> nn.Parameter | nn.Buffer:
    return nn.Parameter(value) if is_learned else nn.Buffer(value)


def _on_row_0(num_heads: int, num_rows: int) -> Tensor:
    """Logits [H, N] whose softmax is 1 at row 0, and 0 elsewhere."""
    logits = torch.full((num_heads, num_rows), -1e4)
    logits[:, 0] = 0
    return logits
