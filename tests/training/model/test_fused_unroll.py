"""A whole unrolling as one operation gives what the cell gives step by step, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from training.model import (
    NTMCell,
    PlainCell,
    RecurrentLayer,
    fused_unroll,
    named_tensors,
    unroll,
    with_tensors,
)

ROOT = Path(__file__).parents[3]

KINDS = [
    {},
    {"num_read_heads": 2, "num_write_heads": 3, "shift_reach": 2},
    {"initial_memory": "learned", "initial_attention": "learned"},
    {"initial_memory": "constant", "initial_attention": "constant"},
    {"architecture": "plain", "controller_layers": 1},
    {"architecture": "plain", "controller_layers": 3},
]


def make_cell(architecture="ntm", **kind) -> NTMCell | PlainCell:
    torch.manual_seed(0)
    if architecture == "plain":
        kind = {"controller": "lstm", "controller_scale": 5.0} | kind
        return PlainCell(input_size=3, output_size=2, controller_size=7, **kind)
    return NTMCell(input_size=3, output_size=2, memory_rows=12, row_width=5, controller_size=7, **kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_outputs_and_all_gradients_are_those_of_the_steps_in_double_precision(kind, num_steps):
    cell, exact = make_cell(**kind), make_cell(**kind).double()
    inputs = torch.randn(num_steps, 4, 3)
    grad_outputs = torch.randn(num_steps, 4, 2)

    outputs, _ = unroll(cell, inputs, is_compiled=True)
    expected, _ = unroll(exact, inputs.double())
    outputs.backward(grad_outputs)
    expected.backward(grad_outputs.double())

    assert_close(outputs.double(), expected, atol=1e-5, rtol=1e-5)
    for (name, weight), reference in zip(cell.named_parameters(), exact.parameters(), strict=True):
        largest = float(reference.grad.abs().max())
        assert_close(weight.grad.double(), reference.grad, atol=1e-4 * largest, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_state_and_parameter_has_the_gradient_that_finite_differences_have(kind):
    cell = make_cell(**kind).double()
    inputs = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    start = named_tensors(cell.initial_state(2))
    given = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}

    def outputs_and_end(inputs, *tensors):
        state = with_tensors(cell.initial_state(2), dict(zip(given, tensors, strict=False)))
        outputs, end = unroll(cell, inputs, state, is_compiled=True)
        return outputs, *named_tensors(end).values()

    weights = [weight for name, weight in cell.named_parameters() if not name.startswith("initial")]
    assert gradcheck(outputs_and_end, (inputs, *given.values(), *weights), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_given_state_it_goes_on_to_the_same_outputs_end_state_and_gradients(kind):
    cell, inputs = make_cell(**kind).double(), torch.randn(6, 4, 3, dtype=torch.float64)
    _, state = unroll(cell, torch.randn(3, 4, 3, dtype=torch.float64))
    found = []
    for is_compiled in (False, True):
        cell.zero_grad()
        fed = inputs.clone().requires_grad_()
        start = {
            name: tensor.detach().clone().requires_grad_() for name, tensor in named_tensors(state).items()
        }

        outputs, end = unroll(cell, fed, with_tensors(state, start), is_compiled=is_compiled)
        everything = [outputs, *named_tensors(end).values()]
        sum(((part + 1) ** 2).sum() for part in everything).backward()

        of_weights = [weight.grad for weight in cell.parameters() if weight.grad is not None]
        found.append([*everything, fed.grad, *(tensor.grad for tensor in start.values()), *of_weights])

    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


def test_an_embedding_before_the_machine_learns_as_by_the_torch_operations():
    """Found so: inputs had no gradient, and an embedding stayed as it was drawn."""
    cell, gradients = make_cell(), []
    for is_compiled in (False, True):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(5, 3)
        unroll(cell, embedding(torch.arange(10).view(5, 2) % 5), is_compiled=is_compiled)[0].sum().backward()
        gradients.append(embedding.weight.grad)

    assert gradients[0].abs().max() > 0.01
    assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [{}, {"controller": "gru"}])
def test_second_derivatives_are_refused_and_not_taken_for_zero(kind):
    cell, inputs = make_cell(**kind), torch.randn(2, 1, 3, requires_grad=True)
    outputs, _ = unroll(cell, inputs, is_compiled=True)

    [gradient] = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", [*KINDS, {"controller": "gru"}])
def test_the_cell_of_a_layer_stays_as_it_is(kind):
    cell = make_cell(**kind)
    before = dict(vars(cell))

    RecurrentLayer(cell)(torch.randn(2, 1, 3))

    assert vars(cell) == before


def test_without_gradients_no_more_is_kept_of_a_longer_sequence():
    """A memory of 0.5 MB for each step would be 150 MB more."""
    program = (
        "import resource, torch\n"
        "from training.model import NTMCell, unroll\n"
        "torch.set_num_threads(1)\n"
        "cell = NTMCell(input_size=3, output_size=2, memory_rows=1024)\n"
        "def peak(steps):\n"
        "    with torch.no_grad(): unroll(cell, torch.zeros(steps, 6, 3), is_compiled=IS_COMPILED)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "peak(3); few = peak(20); print(peak(320) - few)"
    )
    for is_compiled in ("False", "True"):
        ended = subprocess.run(
            [sys.executable, "-c", program.replace("IS_COMPILED", is_compiled)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        assert int(ended.stdout) < 20_000, is_compiled  # kB


def test_without_a_gradient_it_gives_the_same():
    cell, inputs = make_cell(), torch.randn(6, 2, 3)

    with torch.no_grad():
        outputs, _ = unroll(cell, inputs, is_compiled=True)

    assert_close(outputs, unroll(cell, inputs)[0].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "can_fuse"),
    [
        ({}, True),
        ({"controller_layers": 2}, False),
        ({"controller": "gru"}, False),
        ({"controller": "feedforward"}, False),
        ({"architecture": "plain", "controller_layers": 2}, True),
        ({"architecture": "plain", "controller": "mgu", "controller_layers": 1}, False),
        ({"architecture": "plain", "controller": "gru", "controller_layers": 1}, False),
    ],
)
def test_it_is_for_lstm_controllers_and_other_cells_are_unrolled_step_by_step(kind, can_fuse):
    cell, inputs = make_cell(**kind), torch.randn(6, 2, 3)
    expected, _ = unroll(cell, inputs)

    outputs, _ = RecurrentLayer(cell)(inputs)

    assert fused_unroll.can_fuse(cell) == can_fuse
    assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
