"""Controllers against torch's own."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from training.model.controller import FeedforwardController, LSTMController
from training.model.state import LSTMState, Stateless


def test_the_lstm_is_torchs_lstm_cell():
    torch.manual_seed(0)
    ours, theirs = LSTMController(3, 5), nn.LSTMCell(3, 5)
    # Ours keeps the gates as input, forget, output, candidate; torch as input, forget, candidate, output.
    enter, keep, leave, candidate = ours.gates.weight.chunk(4)
    weight = torch.cat([enter, keep, candidate, leave])
    with torch.no_grad():
        theirs.weight_ih.copy_(weight[:, :3])
        theirs.weight_hh.copy_(weight[:, 3:])
        theirs.bias_ih.zero_()
        theirs.bias_hh.zero_()
    inputs, state = torch.randn(2, 3), LSTMState(torch.randn(2, 5), torch.randn(2, 5))

    output, next_state = ours.step([inputs], state)

    expected = theirs(inputs, state)
    assert_close(output, expected[0])
    assert_close(tuple(next_state), expected)


def test_the_feedforward_controller_depends_on_nothing_but_its_input():
    torch.manual_seed(0)
    controller = FeedforwardController(3, 5)
    inputs = torch.randn(2, 3)

    output, state = controller.step([inputs], Stateless())

    assert state == controller.initial_state(2) == Stateless()
    assert_close(output, torch.tanh(inputs @ controller.linear.weight.T + controller.linear.bias))
