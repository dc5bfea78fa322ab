"""One definition of addressing, writing and reading: torch's operations, the kernel and the exported graph agree.

Also on keys that are hardly there and on memories that float32 can hardly hold, where a square is 0 or infinite.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings

from export.onnx_file import graph
from export.step import CellStep
from training.model import NTMCell
from training.model.access import access_memory
from training.model.heads import HeadSizes
from training.model.kernel import compiled_access

SIZES = HeadSizes(num_read_heads=1, num_write_heads=1, row_width=4, shift_reach=1)
NUM_ROWS = 8
POWERS = st.floats(-30, 25)  # Beyond it a product of key and memory has no place in float32 either.


class Handing(torch.nn.Module):
    """In the place of a controller: what the heads are to ask for is the input."""

    def step(self, inputs, state):
        return inputs[0], state

    def initial_state(self, _batch_size):
        return ()


@pytest.fixture(scope="module")
def exported() -> ort.InferenceSession:
    cell = NTMCell(
        input_size=SIZES.num_requested,
        output_size=1,
        memory_rows=NUM_ROWS,
        row_width=SIZES.row_width,
        controller_size=SIZES.num_requested,
        initial_memory="constant",
        initial_attention="constant",
    )
    cell.controller = Handing()
    with torch.no_grad():
        cell.heads.weight[:] = torch.eye(SIZES.num_requested)
        cell.heads.bias.zero_()
    model = graph(CellStep(cell.eval()))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), key_power=POWERS, memory_power=POWERS)
@example(seed=0, key_power=-22.0, memory_power=0.0)
@example(seed=0, key_power=-13.0, memory_power=0.0)
@example(seed=0, key_power=-18.0, memory_power=-6.0)
@example(seed=0, key_power=25.0, memory_power=0.0)
@example(seed=0, key_power=0.0, memory_power=19.0)
@example(seed=0, key_power=0.0, memory_power=25.0)
@example(seed=0, key_power=0.0, memory_power=-30.0)
@example(seed=0, key_power=-30.0, memory_power=25.0)
def test_torch_kernel_and_exported_graph_agree_at_every_scale(exported, seed, key_power, memory_power):
    generator = torch.Generator().manual_seed(seed)
    requested = torch.randn(2, SIZES.num_requested, generator=generator)
    per_head = sum(SIZES.address_sizes)
    for head in range(SIZES.num_heads):
        requested[:, head * per_head : head * per_head + SIZES.row_width] *= 10.0**key_power
    memory = torch.randn(2, SIZES.row_width, NUM_ROWS, generator=generator) * 10.0**memory_power
    previous = torch.softmax(torch.randn(2, SIZES.num_heads, NUM_ROWS, generator=generator), dim=-1)

    by_torch = access_memory(requested, memory, previous, SIZES)
    by_kernel = compiled_access(requested, memory, previous, SIZES)
    feeds = {
        "input": requested.numpy(),
        "memory": memory.numpy(),
        "read_weightings": previous[:, :1].numpy(),
        "write_weightings": previous[:, 1:].numpy(),
        "read_vectors": np.zeros((2, 1, SIZES.row_width), np.float32),
    }
    # A graph has no input that it does not use.
    names, used = (
        [value.name for value in values] for values in (exported.get_outputs(), exported.get_inputs())
    )
    found = dict(zip(names, exported.run(None, {name: feeds[name] for name in used}), strict=True))
    by_graph = [
        np.concatenate([found["next_read_weightings"], found["next_write_weightings"]], axis=1),
        found["next_memory"],
        found["next_read_vectors"],
    ]

    for expected, ours, theirs in zip(by_torch, by_kernel, by_graph, strict=True):
        assert bool(expected.isfinite().all())
        scale = float(expected.abs().max())
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), atol=2e-5 * scale, rtol=1e-4)
        np.testing.assert_allclose(theirs, expected.numpy(), atol=2e-5 * scale, rtol=1e-4)
