"""The machine as a layer does what its steps do one by one, in every form in which torch has sequences."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from training.model import NTM, PlainCell, RecurrentLayer, detach_state, named_tensors, unroll, with_tensors

SIZES = {"memory_rows": 8, "row_width": 4, "controller_size": 6}
PATHS = pytest.mark.parametrize("use_kernel", [True, False])
LENGTHS = [3, 6, 1, 6, 2]


def make_layer(**settings) -> NTM:
    torch.manual_seed(0)
    return NTM(3, 2, **(SIZES | {"initial_memory": "learned", "initial_attention": "learned"} | settings))


def assert_same_state(state, expected):
    for (name, tensor), reference in zip(
        named_tensors(state).items(), named_tensors(expected).values(), strict=True
    ):
        assert_close(tensor, reference, atol=1e-5, rtol=1e-5, msg=name)


@PATHS
def test_outputs_and_end_state_are_those_of_the_steps(use_kernel):
    layer, inputs = make_layer(use_kernel=use_kernel), torch.randn(5, 4, 3)

    outputs, state = layer(inputs)

    expected, after = unroll(layer.cell, inputs)
    assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    assert_same_state(state, after)


@PATHS
def test_a_sequence_in_two_parts_is_the_whole_sequence(use_kernel):
    layer, inputs = make_layer(use_kernel=use_kernel), torch.randn(5, 4, 3, requires_grad=True)

    first, state = layer(inputs[:2])
    second, end = layer(inputs[2:], state)
    torch.cat([first, second]).square().sum().backward()

    of_parts, inputs.grad = inputs.grad, None
    whole, whole_end = layer(inputs)
    whole.square().sum().backward()
    assert_close(torch.cat([first, second]), whole, atol=1e-5, rtol=1e-5)
    assert_same_state(end, whole_end)
    assert_close(of_parts, inputs.grad, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_through_a_state_that_is_detached():
    layer, inputs = make_layer(), torch.randn(4, 1, 3, requires_grad=True)

    _, state = layer(inputs[:2])
    outputs, _ = layer(inputs[2:], detach_state(state))
    outputs.sum().backward()

    assert (inputs.grad[:2] == 0).all()
    assert (inputs.grad[2:] != 0).any()


def test_batch_first_is_the_same_with_the_axes_in_another_order():
    layer, inputs = make_layer(), torch.randn(5, 4, 3)
    turned = make_layer(batch_first=True)

    outputs, state = turned(inputs.transpose(0, 1))

    expected, after = layer(inputs)
    assert_close(outputs.transpose(0, 1), expected)
    assert_same_state(state, after)


def test_one_sequence_alone_needs_no_batch_axis_and_nor_does_its_state():
    layer, inputs = make_layer(), torch.randn(5, 3)

    first, state = layer(inputs[:2])
    second, _ = layer(inputs[2:], state)

    assert state.memory.shape == (4, 8)
    assert_close(torch.cat([first, second]), layer(inputs.unsqueeze(1))[0].squeeze(1))


@PATHS
@pytest.mark.parametrize("batch_first", [False, True])
def test_of_sequences_of_unequal_length_each_ends_as_it_does_alone(use_kernel, batch_first):
    layer = make_layer(use_kernel=use_kernel, batch_first=batch_first)
    inputs = torch.randn(6, 5, 3, requires_grad=True)
    given = inputs.transpose(0, 1) if batch_first else inputs

    outputs, state = layer(given, lengths=LENGTHS)
    outputs = outputs.transpose(0, 1) if batch_first else outputs
    (outputs.sum() + state.memory.square().sum()).backward()

    gradient, inputs.grad = inputs.grad, None
    for row, length in enumerate(LENGTHS):
        alone, after = unroll(layer.cell, inputs[:length, row : row + 1])
        (alone.sum() + after.memory.square().sum()).backward()
        assert_close(outputs[:length, row], alone[:, 0], atol=1e-5, rtol=1e-5)
        assert (outputs[length:, row] == 0).all()
        for name, tensor in named_tensors(after).items():
            assert_close(named_tensors(state)[name][row : row + 1], tensor, atol=1e-5, rtol=1e-5)
    assert_close(gradient, inputs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_come_back_packed_with_the_state_in_the_order_of_the_batch(enforce_sorted):
    layer, inputs = make_layer(), torch.randn(6, 5, 3)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    _, start = layer(torch.randn(2, 5, 3))
    packed = pack_padded_sequence(inputs, torch.tensor(lengths), enforce_sorted=enforce_sorted)

    outputs, state = layer(packed, start)

    expected, after = layer(inputs, start, lengths=lengths)
    padded, counts = pad_packed_sequence(outputs)
    assert counts.tolist() == lengths
    assert_close(padded, expected)
    assert_same_state(state, after)


@pytest.mark.parametrize(
    ("shape", "lengths", "said"),
    [
        ((6, 5, 3), [1, 2], r"lengths must be 5 numbers from 1 to 6, not \[1, 2\]"),
        ((6, 5, 3), [0, 1, 1, 1, 1], "from 1 to 6"),
        ((6, 5, 3), [7, 1, 1, 1, 1], "from 1 to 6"),
        ((6, 3), [6], "one sequence alone has one length"),
        ((6, 5, 4), None, r"\[steps, batch, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(shape, lengths, said):
    with pytest.raises(ValueError, match=said):
        make_layer()(torch.randn(shape), lengths=lengths)


@PATHS
@pytest.mark.parametrize("kind", [{}, {"controller": "gru"}, {"controller_layers": 2}, {"num_read_heads": 2}])
def test_every_gradient_of_a_network_with_the_layer_in_it_is_that_of_torchs_operations(use_kernel, kind):
    """An embedding before it and a start state of its own: both learn."""
    layer = make_layer(use_kernel=use_kernel, **kind).double()
    embedding, symbols = nn.Embedding(7, 3).double(), torch.randint(7, (5, 4))
    start = {name: tensor.clone() for name, tensor in named_tensors(layer.initial_state(4)).items()}

    def gradients(run):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in start.items()}
        outputs, state = run(embedding(symbols), with_tensors(layer.initial_state(4), leaves))
        loss = outputs.square().sum() + sum(tensor.square().sum() for tensor in named_tensors(state).values())
        parameters = [embedding.weight, *leaves.values(), *layer.parameters()]
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    for ours, theirs in zip(
        gradients(layer), gradients(lambda inputs, state: unroll(layer.cell, inputs, state)), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_can_be_of_another_dtype(dtype):
    layer = make_layer(dtype=dtype)

    outputs, state = layer(torch.randn(3, 2, 3, dtype=dtype))
    outputs.sum().backward()

    assert outputs.dtype == state.memory.dtype == dtype
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in layer.parameters())


def test_under_autocast_it_gives_nearly_the_same():
    layer, inputs = make_layer(), torch.randn(3, 2, 3)

    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = layer(inputs)
    outputs.float().sum().backward()

    assert_close(outputs.float(), layer(inputs)[0], atol=0.05, rtol=0.05)
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())


def test_it_can_be_compiled_by_torch():
    layer, inputs = make_layer(), torch.randn(3, 2, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    outputs, _ = compiled(inputs)
    outputs.sum().backward()

    assert_close(outputs, layer(inputs)[0], atol=1e-5, rtol=1e-5)


def test_its_weights_are_saved_and_loaded_as_any_modules_are():
    layer, inputs = make_layer(), torch.randn(3, 2, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = NTM(3, 2, **SIZES, initial_memory="learned", initial_attention="learned")

    other.load_state_dict(torch.load(file, weights_only=True))

    assert_close(other(inputs)[0], layer(inputs)[0])
    assert_close(copy.deepcopy(layer)(inputs)[0], layer(inputs)[0])


def test_a_plain_network_is_a_layer_too():
    cell = PlainCell(
        input_size=3,
        output_size=2,
        controller="lstm",
        controller_size=6,
        controller_layers=2,
        controller_scale=1,
    )
    inputs = torch.randn(4, 2, 3)

    outputs, state = RecurrentLayer(cell)(inputs, lengths=[4, 2])

    expected, after = unroll(cell, inputs[:, :1])
    assert_close(outputs[:, :1], expected, atol=1e-5, rtol=1e-5)
    assert_close(state.controller[1].cell[:1], after.controller[1].cell, atol=1e-5, rtol=1e-5)
