"""Sequences: laid out as in training, and made by the Python lines beside them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format

from inspector import sequences
from inspector.errors import BadRequestError
from inspector.sequences import Sequence
from ntm.v1 import model_pb2, tensor_pb2
from training.tasks import TASKS

SIZES = {
    "copy": ((5,), {"length": 5}),
    "repeat-copy": ((4, 3), {"length": 4, "repeats": 3}),
    "associative-recall": ((6,), {"items": 6}),
    "dynamic-ngrams": ((200,), {"bits": 200}),
    "priority-sort": ((20, 16), {"vectors": 20, "due": 16}),
}


def spec_of(task: str) -> model_pb2.ModelSpec:
    made = TASKS[task]()
    spec = model_pb2.ModelSpec(task=task)
    spec.inputs.add(dtype=tensor_pb2.DATA_TYPE_FP32, shape=[made.input_size])
    json_format.ParseDict({"task": made.model_dump()}, spec.provenance.training_config)
    return spec


def vector_spec(*shape: int, dtype: Any = tensor_pb2.DATA_TYPE_FP32) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(inputs=[model_pb2.TensorSpec(dtype=dtype, shape=shape)])


def sequence_of(task: str, **parameters: int) -> Sequence:
    return sequences.kinds(spec_of(task))[0].sequence(parameters)


def reordered(array: Any, task: str) -> Any:
    """What two draws of a task have in common: the numbers that are no random bits."""
    return array[:, 1:] if task == "dynamic-ngrams" else array


@pytest.mark.parametrize("task", SIZES)
def test_a_tasks_sequence_has_trainings_layout(task: str) -> None:
    size, parameters = SIZES[task]
    theirs = TASKS[task]().draw(1, size, torch.Generator().manual_seed(0))

    ours = sequence_of(task, **parameters)

    assert ours.targets is not None
    assert ours.inputs.shape == tuple(theirs.inputs[:, 0].shape)
    assert ours.targets.shape == tuple(theirs.targets[:, 0].shape)
    # Where training's sequences are always zero, or always the same number, so are these.
    many = TASKS[task]().draw(500, size, torch.Generator().manual_seed(1)).inputs.numpy()
    fixed = many.std(axis=1) == 0
    np.testing.assert_allclose(ours.inputs[fixed], many[:, 0][fixed], atol=1e-6)
    assert set(np.unique(ours.targets)) <= {0, 1}


def test_the_targets_are_what_the_task_is() -> None:
    copy = sequence_of("copy", length=5)
    np.testing.assert_array_equal(copy.targets, copy.inputs[:5, :8])

    repeat = sequence_of("repeat-copy", length=4, repeats=3)
    assert repeat.targets is not None
    np.testing.assert_array_equal(repeat.targets[:-1, :8], np.tile(repeat.inputs[:4, :8], (3, 1)))
    assert repeat.targets[-1].tolist() == [0] * 8 + [1]

    recall = sequence_of("associative-recall", items=6, seed=3)
    items = recall.inputs[:24].reshape(6, 4, 8)[:, 1:, :6]
    asked = recall.inputs[25:28, :6]
    (place,) = [i for i in range(5) if (items[i] == asked).all()]
    np.testing.assert_array_equal(recall.targets, items[place + 1])

    bits = sequence_of("dynamic-ngrams", bits=200)
    assert bits.targets is not None
    np.testing.assert_array_equal(bits.targets[:-1], bits.inputs[1:])

    sort = sequence_of("priority-sort", vectors=20, due=16)
    order = sorted(range(20), key=lambda i: -sort.inputs[i, 8])[:16]
    np.testing.assert_array_equal(sort.targets, sort.inputs[order, :8])


@pytest.mark.parametrize("task", SIZES)
def test_the_python_lines_make_the_same_inputs(task: str) -> None:
    _, parameters = SIZES[task]
    for kind in sequences.kinds(spec_of(task)):
        made = kind.sequence({"seed": 7, **parameters} if kind.name == task else {})
        names: dict[str, Any] = {"np": np}
        exec(made.python, names)
        np.testing.assert_array_equal(names["inputs"], made.inputs, err_msg=kind.name)
        assert names["inputs"].dtype == made.inputs.dtype


def test_a_model_of_no_known_task_takes_random_numbers_and_zeros() -> None:
    spec = vector_spec(2, 3, dtype=tensor_pb2.DATA_TYPE_INT64)

    made = [kind.sequence({"steps": 4}) for kind in sequences.kinds(spec)]

    assert [kind.name for kind in sequences.kinds(spec)] == ["random", "zeros"]
    assert all(one.inputs.shape == (4, 2, 3) and one.inputs.dtype == np.int64 for one in made)
    assert sequences.kinds(model_pb2.ModelSpec(task="copy", inputs=spec.inputs))[0].name == "random"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"length": 0}, "choose 1 to"),
        ({"length": 1.5}, "whole number"),
        ({"length": True}, "whole number"),
        ({"height": 3}, "no parameter"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        sequences.kinds(spec_of("copy"))[0].sequence(parameters)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_a_file_is_read_whatever_it_is() -> None:
    expected = np.array([[1, 2, 3], [4, 5, 6.5]], np.float32)

    for content in (
        npy(expected),
        npy(expected.reshape(-1)),
        b"1,2,3\n4,5,6.5\n",
        b"\xef\xbb\xbf1 2 3\n4;5;6.5",
    ):
        np.testing.assert_array_equal(sequences.from_file(content, "f", vector_spec(3)).inputs, expected)
    scalar = sequences.from_file(b"1\n2\n", "f", vector_spec())
    assert scalar.inputs.tolist() == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"one, two",
        b"1,2\n3",
        b"\xff\xfe\x00",
        b"1,2,3,4",
        b"nan,1,2",
        npy(np.array([{}], object)),
        npy(np.zeros((2, 4))),
        npy(np.zeros((2, 2, 3))),
        b"\x93NUMPY",
    ],
)
def test_a_file_that_is_no_sequence_is_refused(content: bytes) -> None:
    with pytest.raises(BadRequestError, match="inputs"):
        sequences.from_file(content, "inputs", vector_spec(3))


@pytest.mark.parametrize(
    "values", [[1], [1, 2, 3, 4], ["a", 1, 2], None, [1, 2, float("nan")], [[1], [2, 3]]]
)
def test_a_step_by_hand_takes_the_right_count_of_numbers(values: Any) -> None:
    assert sequences.by_hand([1, 2, 3], vector_spec(3)).inputs.tolist() == [[1, 2, 3]]
    with pytest.raises(BadRequestError, match="a step takes"):
        sequences.by_hand(values, vector_spec(3))
