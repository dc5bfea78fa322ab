"""Access does what the equations of Graves et al. (2016) and Csordás and Schmidhuber (2019) say, read slowly."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from tests.training.model.dnc.helpers import EACH, empty, in_use
from tests.training.model.dnc.reading import Machine
from training.model.dnc.access import Accessed, access_memory, allocation, linked, retention, sharpen
from training.model.dnc.heads import DNCSizes, Improvements
from training.model.dnc.kernel import compiled_access


@pytest.mark.parametrize("improvements", EACH)
@pytest.mark.parametrize(
    ("num_reads", "num_rows", "scale"), [(1, 5, 1.0), (3, 4, 3.0), (2, 1, 1.0), (1, 6, 8.0)]
)
def test_twenty_steps_are_those_of_a_slow_reading_of_the_equations(improvements, num_reads, num_rows, scale):
    sizes = DNCSizes(num_reads, 3, improvements)
    machine, state = Machine(num_rows, 3, num_reads, improvements), empty(sizes, num_rows)
    requests = (
        scale * torch.randn(20, 1, sizes.num_requested, generator=torch.Generator().manual_seed(0)).double()
    )

    for requested in requests:
        state = access_memory(requested, state, sizes)
        read = machine.step(requested[0].tolist())

        expected = [machine.M, machine.u, [machine.w_w], machine.p, machine.L, machine.w_r, read]
        for name, ours, theirs in zip(Accessed._fields, state, expected, strict=True):
            value = torch.tensor(theirs, dtype=torch.float64)
            assert_close(ours[0].mT if name == "memory" else ours[0], value, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("improvements", EACH)
def test_gradients_of_all_that_goes_in_are_those_of_small_changes(improvements):
    sizes = DNCSizes(2, 2, improvements)
    state = in_use(sizes, 4)
    requested = torch.randn(1, sizes.num_requested, generator=torch.Generator().manual_seed(2)).double()
    inputs = [requested, *state[:-1]]

    def run(requested, *before):
        return tuple(access_memory(requested, Accessed(*before, state.read_vectors), sizes))

    assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in inputs])


def test_rows_are_allocated_in_the_order_of_their_usage():
    usage = torch.tensor([[0.8, 0.25, 1.0, 0.5]], dtype=torch.float64)

    allocated = allocation(usage)

    expected = [[0.2 * 0.25 * 0.5, 0.75, 0.0, 0.5 * 0.25]]
    assert_close(allocated, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_first_of_free_rows_is_allocated_whatever_rounding_has_left_of_their_usage():
    usage = torch.tensor([[1.0, 2e-7, 1e-7, 0.0]])

    allocated = allocation(usage)

    assert_close(allocated, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), atol=1e-5, rtol=0)


def test_a_full_memory_allocates_nothing():
    assert_close(allocation(torch.ones(2, 5)), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_what_any_head_reads_and_frees_is_free():
    read = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]])

    kept = retention(torch.ones(1, 2, 1), read)

    assert_close(kept, torch.tensor([[0.0, 0.5, 1.0]]))


def test_links_lead_from_each_row_to_the_one_that_was_written_next():
    order, num_rows = [2, 0, 3], 4
    links, precedence = torch.zeros(1, num_rows, num_rows), torch.zeros(1, num_rows)
    for row in order:
        written = torch.eye(num_rows)[[row]]
        links, precedence = linked(links, precedence, written), written

    at = torch.eye(num_rows)[[2]].unsqueeze(1)
    forward = [int((at := at @ links.mT).argmax()) for _ in order[1:]]

    assert [2, *forward] == order
    assert links.sum() == 2


def test_sharpening_keeps_where_a_walk_has_come_to():
    blurred = torch.tensor([[[0.1, 0.3, 0.05, 0.0]]], dtype=torch.float64)

    sharp = sharpen(blurred, torch.tensor([[[3.0]]], dtype=torch.float64))

    powers = torch.tensor([[[1.0, 27.0, 0.125, 0.0]]], dtype=torch.float64)
    assert_close(sharp, powers / powers.sum())


@pytest.mark.parametrize("access", [access_memory, compiled_access])
def test_what_hardly_is_written_is_written_as_exactly_as_the_rest(access):
    sizes = DNCSizes(1, 2, Improvements(False, False, False))
    requested = torch.zeros(1, sizes.num_requested, dtype=torch.float64)
    requested[0, -2:] = torch.tensor([14.0, 3.0])  # nearly all is allocated, and written

    exact = access_memory(requested, empty(sizes, 4), sizes).write_weightings
    single = access(requested.float(), empty(sizes, 4, dtype=torch.float32), sizes).write_weightings

    assert exact[0, 0, -1] < 1e-6
    assert_close(single.double(), exact, rtol=1e-5, atol=0)


def test_a_freed_row_is_cleared_with_deallocation_and_stays_without():
    for is_cleared in (True, False):
        sizes = DNCSizes(1, 2, Improvements(False, is_cleared, False))
        state = empty(sizes, 3)._replace(
            memory=torch.ones(1, 2, 3, dtype=torch.float64),
            usage=torch.ones(1, 3, dtype=torch.float64),
            read_weightings=torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64),
        )
        requested = torch.zeros(1, sizes.num_requested, dtype=torch.float64)
        requested[0, sum(sizes.read_sizes) - 1] = 50.0  # the free gate opens
        requested[0, -1] = -50.0  # the write gate is closed

        after = access_memory(requested, state, sizes)

        cleared = 0.0 if is_cleared else 1.0
        assert_close(after.memory[0, 0], torch.tensor([1.0, cleared, 1.0], dtype=torch.float64))
        assert_close(after.usage[0], torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(
    improvements=st.sampled_from(EACH),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
)
def test_all_stays_in_its_range_and_finite_over_many_steps(improvements, seed, scale):
    sizes = DNCSizes(2, 3, improvements)
    generator = torch.Generator().manual_seed(seed)
    requests = (scale * torch.randn(40, 2, sizes.num_requested, generator=generator)).requires_grad_()
    state = empty(sizes, 8, batch=2, dtype=torch.float32)

    for requested in requests:
        state = access_memory(requested, state, sizes)
    sum(tensor.square().sum() for tensor in state).backward()

    for part in (state.usage, state.write_weightings, state.precedence, state.links, state.read_weightings):
        assert part.min() >= -1e-5
        assert part.max() <= 1 + 1e-5
    for attention in (state.write_weightings, state.read_weightings, state.precedence, state.links):
        assert attention.sum(-1).max() <= 1 + 1e-4
    assert (state.links.diagonal(dim1=1, dim2=2) == 0).all()
    assert all(tensor.isfinite().all() for tensor in state)
    assert requests.grad.isfinite().all()
