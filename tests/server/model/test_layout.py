"""Steps as bytes: what goes in comes out, and what is not finite is found."""

from __future__ import annotations

import numpy as np

from ntm.v1 import model_pb2, tensor_pb2
from server.model.layout import StepLayout

FRAME = model_pb2.TensorSpec(name="frame", dtype=tensor_pb2.DATA_TYPE_FP32, shape=[3])
RATE = model_pb2.TensorSpec(name="rate", dtype=tensor_pb2.DATA_TYPE_INT64, shape=[])


def test_tensors_come_out_of_a_step_as_they_went_in() -> None:
    layout = StepLayout([FRAME, RATE], has_reset=True)
    frames = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    rates = np.arange(8).reshape(2, 4)
    resets = rates % 3 == 0

    steps = layout.pack({"frame": frames, "rate": rates}, resets)

    assert steps.shape == (2, 4)
    np.testing.assert_array_equal(layout.unpack(steps)["frame"], frames)
    np.testing.assert_array_equal(layout.unpack(steps)["rate"], rates)
    np.testing.assert_array_equal(layout.resets(steps), resets)


def test_steps_of_the_same_tensors_have_the_same_bytes() -> None:
    layout = StepLayout([RATE, FRAME], has_reset=True)
    tensors = {"frame": np.ones((5, 3), np.float32), "rate": np.zeros(5, np.int64)}

    assert layout.pack(tensors).tobytes() == layout.pack(tensors).tobytes()


def test_a_single_tensor_takes_no_more_bytes_than_it_has() -> None:
    assert StepLayout([FRAME]).step_bytes == 12


def test_a_number_that_is_not_finite_is_found_in_its_step() -> None:
    layout = StepLayout([FRAME, RATE])
    frames = np.zeros((2, 4, 3), np.float32)
    frames[1, 2, 0] = np.nan

    steps = layout.pack({"frame": frames, "rate": np.zeros((2, 4), np.int64)})

    assert not layout.are_finite(steps)
    assert np.argwhere(~layout.finite(steps)).tolist() == [[1, 2]]
