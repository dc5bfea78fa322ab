"""The whole cell: shapes, invariants over many steps, independence of the batch, the kinds of start."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from training.model import NTMCell, named_tensors, unroll, with_memory_rows, with_tensors
from training.model.addressing import address
from training.model.heads import split

KINDS = [
    {},
    {"controller": "feedforward"},
    {"controller": "gru"},
    {"controller": "mgu", "controller_layers": 2},
    {"num_read_heads": 3, "num_write_heads": 2, "shift_reach": 2},
    {"initial_memory": "constant", "initial_attention": "constant"},
    {"initial_memory": "learned"},
]


def make_cell(**kind) -> NTMCell:
    torch.manual_seed(0)
    sizes = {"input_size": 3, "output_size": 2, "memory_rows": 8, "row_width": 4, "controller_size": 6}
    return NTMCell(**(sizes | kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_the_shape_of_every_state_tensor(kind):
    cell = make_cell(**kind)
    state = cell.initial_state(5)

    outputs, next_state = cell.step(torch.randn(5, 3), state)

    assert outputs.shape == (5, 2)
    heads = {"num_read_heads": 1, "num_write_heads": 1} | kind
    assert state.memory.shape == (5, 4, 8)
    assert state.read_weightings.shape == (5, heads["num_read_heads"], 8)
    assert state.write_weightings.shape == (5, heads["num_write_heads"], 8)
    assert state.read_vectors.shape == (5, heads["num_read_heads"], 4)
    before, after = named_tensors(state), named_tensors(next_state)
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1.0, 100.0]))
def test_weightings_are_distributions_and_all_is_finite_over_many_steps(kind, seed, scale):
    cell = make_cell(**kind)
    inputs = scale * torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(seed))

    outputs, state = unroll(cell, inputs)
    outputs.square().mean().backward()

    for weightings in (state.read_weightings, state.write_weightings):
        assert (weightings >= 0).all()
        assert_close(weightings.sum(-1), torch.ones(weightings.shape[:2]), atol=1e-5, rtol=0)
    assert all(tensor.isfinite().all() for tensor in named_tensors(state).values())
    assert all(weight.grad.isfinite().all() for weight in cell.parameters() if weight.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_gives_the_same_alone_and_in_a_batch(kind):
    cell = make_cell(**kind)
    inputs = torch.randn(10, 4, 3)

    together, _ = unroll(cell, inputs)

    for row in range(4):
        alone, _ = unroll(cell, inputs[:, [row]])
        assert_close(alone, together[:, [row]], atol=1e-5, rtol=1e-4)


def test_a_sequence_cut_in_two_gives_the_same_because_all_memory_is_in_the_state():
    cell = make_cell()
    inputs = torch.randn(9, 2, 3)

    whole, end = unroll(cell, inputs)
    first, middle = unroll(cell, inputs[:4])
    unroll(cell, torch.randn(5, 2, 3))  # What the cell does in between leaves no trace.
    second, end_of_second = unroll(cell, inputs[4:], middle)

    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(end_of_second.memory, end.memory)


def test_reads_see_what_the_same_step_wrote():
    cell = make_cell()

    _, state = cell.step(torch.randn(2, 3), cell.initial_state(2))

    assert_close(state.read_vectors, state.read_weightings @ state.memory.mT)


def test_a_constant_start_has_every_head_on_row_0_of_an_even_memory():
    state = make_cell(initial_memory="constant", initial_attention="constant").initial_state(2)

    assert (state.memory == 1e-6).all()
    assert (state.read_weightings[..., 0] == 1).all()
    assert (state.write_weightings[..., 0] == 1).all()
    assert (state.read_vectors == 0).all()


def test_a_random_memory_is_drawn_once_and_saved_with_the_weights():
    cell, other = make_cell(initial_memory="random"), make_cell(initial_memory="random")
    torch.nn.init.zeros_(other.initial_memory)

    other.load_state_dict(cell.state_dict())

    assert torch.equal(cell.initial_state(1).memory, cell.initial_state(1).memory)
    assert torch.equal(other.initial_state(1).memory, cell.initial_state(1).memory)
    assert len(cell.initial_state(1).memory.unique()) > 1


def test_a_learned_start_receives_gradients_and_a_constant_one_does_not():
    learned = make_cell(initial_memory="learned", initial_attention="learned")
    constant = make_cell(initial_memory="constant", initial_attention="constant")

    names = {"initial_memory", "initial_attention_logits", "initial_read_vectors"}
    unroll(learned, torch.randn(4, 2, 3))[0].sum().backward()

    assert names <= dict(learned.named_parameters()).keys()
    assert all(dict(learned.named_parameters())[name].grad.abs().sum() > 0 for name in names)
    assert not names & dict(constant.named_parameters()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_naming_the_tensors_of_a_state_can_be_undone(kind):
    state = make_cell(**kind).initial_state(2)

    rebuilt = with_tensors(state, named_tensors(state))

    assert all(torch.equal(a, b) for a, b in zip(rebuilt[:-1], state[:-1], strict=True))
    assert type(rebuilt.controller) is type(state.controller)


def test_a_step_is_addressing_then_writing_then_reading_head_by_head():
    """With two read heads and one write head, whose weightings no shape would tell apart if they were mixed up."""
    cell = make_cell(num_read_heads=2)
    torch.manual_seed(1)
    state = cell.initial_state(1)
    state = state._replace(
        memory=torch.randn(1, 4, 8),
        read_weightings=torch.rand(1, 2, 8).softmax(-1),
        write_weightings=torch.rand(1, 1, 8).softmax(-1),
        read_vectors=torch.randn(1, 2, 4),
    )
    inputs = torch.randn(1, 3)

    outputs, after = cell.step(inputs, state)

    hidden, controller = cell.controller.step(
        [inputs, state.read_vectors[:, 0], state.read_vectors[:, 1]], state.controller
    )
    request, to_write = split(cell.heads(hidden), cell.heads.sizes)
    previous = [state.read_weightings[:, 0], state.read_weightings[:, 1], state.write_weightings[:, 0]]
    weightings = [
        address(
            type(request)(*(quantity[:, head : head + 1] for quantity in request)),
            state.memory,
            last[:, None],
        )[0, 0]
        for head, last in enumerate(previous)
    ]
    erased = torch.outer(to_write.erase[0, :, 0], weightings[2])
    memory = state.memory[0] * (1 - erased) + torch.outer(to_write.add[0, :, 0], weightings[2])
    read = [memory @ weightings[0], memory @ weightings[1]]
    assert_close(after.read_weightings[0], torch.stack(weightings[:2]))
    assert_close(after.write_weightings[0], weightings[2][None])
    assert_close(after.memory[0], memory)
    assert_close(after.read_vectors[0], torch.stack(read))
    assert_close(tuple(after.controller[0]), tuple(controller[0]))
    assert_close(outputs, cell.output(torch.cat([hidden[0], *read]))[None])


def test_with_other_rows_it_is_the_cell_made_with_so_many_and_the_same_weights():
    cell = make_cell(initial_memory="constant", initial_attention="constant")
    expected = make_cell(memory_rows=24, initial_memory="constant", initial_attention="constant")
    weights = {name: value for name, value in cell.state_dict().items() if not name.startswith("initial_")}
    expected.load_state_dict(weights, strict=False)
    inputs = torch.randn(30, 2, 3)

    resized = with_memory_rows(cell, 24)

    assert torch.equal(unroll(resized, inputs)[0], unroll(expected, inputs)[0])
    assert cell.initial_memory.shape == (8, 4)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_sequence_goes_on_over_as_many_rows_as_its_start_has(is_compiled):
    cell = make_cell(initial_memory="constant", initial_attention="constant")
    inputs = torch.randn(30, 2, 3)

    outputs, state = unroll(cell, inputs, cell.initial_state(2, 24), is_compiled=is_compiled)

    expected, _ = unroll(with_memory_rows(cell, 24), inputs, is_compiled=is_compiled)
    assert torch.equal(outputs, expected)
    assert state.memory.shape == (2, 4, 24)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ({"initial_memory": "learned"}, 24, "the memory at the start is learned for each row"),
        ({"initial_memory": "random"}, 24, "the memory at the start is drawn for each row"),
        ({"initial_attention": "learned"}, 24, "the first attention is learned for each row"),
        ({"shift_reach": 2}, 4, "need at least 5 rows"),
    ],
)
def test_a_start_that_is_given_row_by_row_has_no_other_rows(kind, rows, message):
    cell = make_cell(**({"initial_memory": "constant", "initial_attention": "constant"} | kind))

    with pytest.raises(ValueError, match=message):
        with_memory_rows(cell, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_memory_is_addressed_in_full_precision(dtype):
    """In float16 the floors under norms and attention are 0, and loss and gradients were NaN."""
    torch.manual_seed(0)
    cell = NTMCell(input_size=3, output_size=2, initial_memory="constant", initial_attention="constant")
    inputs = torch.randn(6, 2, 3)

    with torch.autocast("cpu", dtype=dtype):
        outputs, end = unroll(cell, inputs)
    loss = outputs.float().square().mean()
    loss.backward()

    assert end.memory.dtype == end.read_weightings.dtype == end.read_vectors.dtype == torch.float32
    torch.testing.assert_close(outputs.float(), unroll(cell, inputs)[0], atol=0.05, rtol=0.05)
    assert all(weight.grad.isfinite().all() for weight in cell.parameters() if weight.grad is not None)
