"""Controllers against torch's own, and against loops that follow the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from training.model.controller import Controller, FeedforwardLayer, GRULayer, LSTMLayer, MGULayer
from training.model.state import HiddenState, LSTMState


def test_the_lstm_is_torchs_lstm_cell():
    torch.manual_seed(0)
    ours, theirs = LSTMLayer(3, 5, scale=5), nn.LSTMCell(3, 5)
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


def test_the_gru_is_torchs_gru_cell():
    torch.manual_seed(0)
    ours, theirs = GRULayer(3, 5, scale=5), nn.GRUCell(3, 5)
    for linear in (ours.gates, ours.from_inputs, ours.from_hidden):
        nn.init.normal_(linear.bias)
    # Ours has one bias for both parts of a gate.
    with torch.no_grad():
        theirs.weight_ih.copy_(torch.cat([ours.gates.weight[:, :3], ours.from_inputs.weight]))
        theirs.weight_hh.copy_(torch.cat([ours.gates.weight[:, 3:], ours.from_hidden.weight]))
        theirs.bias_ih.copy_(torch.cat([ours.gates.bias, ours.from_inputs.bias]))
        theirs.bias_hh.copy_(torch.cat([torch.zeros(10), ours.from_hidden.bias]))
    inputs, state = torch.randn(2, 3), HiddenState(torch.randn(2, 5))

    output, next_state = ours.step([inputs[:, :1], inputs[:, 1:]], state)

    expected = theirs(inputs, state.hidden)
    assert_close(output, expected)
    assert_close(next_state.hidden, expected)


def test_the_minimal_gated_unit_follows_its_formulas_unit_by_unit():
    torch.manual_seed(0)
    layer = MGULayer(2, 3, scale=5)
    nn.init.normal_(layer.gate.bias)
    nn.init.normal_(layer.candidate.bias)
    inputs, hidden = torch.randn(2), torch.randn(3)

    output, next_state = layer.step([inputs[None]], HiddenState(hidden[None]))

    def unit(linear: nn.Linear, index: int, fed: list[float]) -> float:
        weights, bias = linear.weight[index].tolist(), linear.bias[index].item()
        return bias + sum(weight * value for weight, value in zip(weights, fed, strict=True))

    before, fed = hidden.tolist(), inputs.tolist()
    forget = [1 / (1 + math.exp(-unit(layer.gate, i, fed + before))) for i in range(3)]
    kept = [f * h for f, h in zip(forget, before, strict=True)]
    for i in range(3):
        candidate = math.tanh(unit(layer.candidate, i, fed + kept))
        expected = (1 - forget[i]) * before[i] + forget[i] * candidate
        assert output[0, i].item() == pytest.approx(expected, abs=1e-5)
    assert_close(next_state.hidden, output)


def test_a_feedforward_layer_depends_on_nothing_but_its_input():
    torch.manual_seed(0)
    controller = Controller("feedforward", 3, 5)
    [layer] = controller.layers
    inputs = torch.randn(2, 3)

    output, state = controller.step([inputs], ())

    assert isinstance(layer, FeedforwardLayer)
    assert state == controller.initial_state(2) == ()
    assert_close(output, torch.tanh(inputs @ layer.weight.T + layer.bias))


@pytest.mark.parametrize("kind", ["lstm", "gru", "mgu", "feedforward"])
def test_each_layer_is_fed_by_the_one_below(kind):
    torch.manual_seed(0)
    controller = Controller(kind, 3, 5, num_layers=2)
    inputs, state = torch.randn(4, 3), controller.initial_state(4)

    output, next_state = controller.step([inputs], state)

    below, above = controller.layers
    if kind == "feedforward":
        assert_close(output, above(below(inputs)))
    else:
        between, below_state = below.step([inputs], state[0])
        expected, above_state = above.step([between], state[1])
        assert_close(output, expected)
        for after, expected_state in zip(next_state, (below_state, above_state), strict=True):
            assert_close(tuple(after), tuple(expected_state))


def test_a_forget_bias_is_that_of_the_forget_gates_alone():
    layer = LSTMLayer(3, 2, scale=5, forget_bias=-2)

    assert layer.gates.bias.tolist() == [0, 0, -2, -2, 0, 0, 0, 0]
