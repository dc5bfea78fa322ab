"""The plain cell: a controller alone, without memory and heads, as the paper's baselines are.

It has the interface of `cell.NTMCell`, so that it is trained, exported and served by the same code.

Shapes: B batch, I input size, O output size.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.model.controller import Controller, ControllerKind
from training.model.state import PlainState


class PlainCell(nn.Module):
    """A recurrent network as a function from an input and a state to an output and the next state.

    Args:
        input_size: numbers in an input.
        output_size: numbers in an output.
        controller: the kind of its layers, one that carries something along.
        controller_size: units in a layer.
        controller_layers: layers, each fed by the one below.
        controller_scale: weights are drawn from U(±scale / √(inputs + units)).
        forget_bias: of an LSTM's forget gates at the start.
    """

    def __init__(
        self,
        *,
        input_size: int,
        output_size: int,
        controller: ControllerKind,
        controller_size: int,
        controller_layers: int,
        controller_scale: float,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.controller = Controller(
            controller, input_size, controller_size, controller_layers, controller_scale, forget_bias
        )
        self.output = nn.Linear(controller_size, output_size)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.normal_(self.output.bias, std=0.01)

    def initial_state(self, batch_size: int) -> PlainState:
        """The state every sequence starts from, the same in every row of the batch."""
        return PlainState(self.controller.initial_state(batch_size))

    def step(self, inputs: Tensor, state: PlainState) -> tuple[Tensor, PlainState]:
        """One time step.

        Args:
            inputs: [B, I].
            state: what the last step returned, or `initial_state`.

        Returns:
            [B, O] the output as logits, and the next state.
        """
        controlled, controller = self.controller.step([inputs], state.controller)
        return self.output(controlled), PlainState(controller)
