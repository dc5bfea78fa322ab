"""Specs: what a model file must declare, and every way in which it can disagree with its graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from onnx import helper

from ntm.tensor import to_message
from ntm.v1 import model_pb2, tensor_pb2
from server.errors import ModelFileError
from server.model import spec
from server.model.describe import Hints, draft
from tests import step_models

Change = Callable[[model_pb2.ModelSpec], object]


def problems_of(tmp_path: Path, content: bytes) -> tuple[str, ...]:
    path = step_models.write(tmp_path, content)
    with pytest.raises(ModelFileError) as caught:
        spec.load(path, "test", 1)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_a_model_is_read_with_its_digest(tmp_path: Path) -> None:
    path = step_models.write(tmp_path, step_models.many_layouts())

    model = spec.load(path, "test", 1)

    assert model.label == "test/1"
    assert re.fullmatch("[0-9a-f]{64}", model.digest)
    assert model.state_bytes == 8 * 4 + 6 * 4 + 8


def test_a_model_without_metadata_is_described_by_the_file_beside_it(tmp_path: Path) -> None:
    step, declared = step_models.read_back(step_models.accumulator())
    del step.metadata_props[:]
    path = step_models.write(tmp_path, step.SerializeToString())
    path.with_name("model_spec.json").write_text(json_format.MessageToJson(declared))

    assert spec.load(path, "test", 1).spec == declared


def test_a_model_without_any_spec_is_refused(tmp_path: Path) -> None:
    step, _ = step_models.read_back(step_models.accumulator())
    del step.metadata_props[:]

    (problem,) = problems_of(tmp_path, step.SerializeToString())

    assert "no spec" in problem
    assert "model_spec.json" in problem


@pytest.mark.parametrize("content", [b"", b"no model", step_models.accumulator()[:200]])
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (problem,) = problems_of(tmp_path, content)

    assert "not a valid ONNX file" in problem or "no spec" in problem


def test_a_graph_that_computes_other_shapes_than_it_declares_is_refused(tmp_path: Path) -> None:
    step, declared = step_models.read_back(step_models.accumulator())
    step.graph.node.add().CopyFrom(helper.make_node("Concat", ["next_sum", "next_sum"], ["twice"], axis=1))
    step.graph.node[2].input[0] = "twice"
    step.graph.node.insert(2, step.graph.node.pop())

    (problem,) = problems_of(tmp_path, step_models.with_spec(step, declared))

    assert "not a valid ONNX file" in problem


def test_a_sidecar_that_is_no_text_is_refused(tmp_path: Path) -> None:
    step, _ = step_models.read_back(step_models.accumulator())
    del step.metadata_props[:]
    path = step_models.write(tmp_path, step.SerializeToString())
    path.with_name("model_spec.json").write_bytes(b"\xff\xfe")

    with pytest.raises(ModelFileError, match="is not a ModelSpec"):
        spec.load(path, "test", 1)


def test_a_spec_that_is_no_json_is_refused(tmp_path: Path) -> None:
    step, _ = step_models.read_back(step_models.accumulator())
    helper.set_model_props(step, {spec.METADATA_KEY: "{"})

    (problem,) = problems_of(tmp_path, step.SerializeToString())

    assert "is not a ModelSpec" in problem


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: setattr(s.inputs[0], "name", "z"), "input 'z' is in the spec but not in the graph"),
        (lambda s: setattr(s.inputs[0], "name", "z"), "graph input 'x' is not in the spec"),
        (lambda s: setattr(s.outputs[0], "dtype", tensor_pb2.DATA_TYPE_FP64), "FP64 in the spec and FP32"),
        (lambda s: setattr(s.outputs[0], "dtype", 0), "unknown"),
        (lambda s: s.inputs[0].shape.append(2), "has 3 axes in the spec, batch included, and 2 in the graph"),
        (lambda s: s.inputs[0].shape.__setitem__(0, 4), "shape [4] in the spec and [3] in the graph"),
        (lambda s: s.inputs[0].shape.__setitem__(0, 0), "axis below 1"),
        (lambda s: setattr(s.inputs[0], "batch_axis", 1), "fixes its batch axis 1 to 3"),
        (lambda s: setattr(s.inputs[0], "batch_axis", 2), "outside its 2 axes"),
        (lambda s: s.states.pop(), "graph input 'sum' is not in the spec"),
        (lambda s: s.states.pop(), "has no states"),
        (lambda s: s.states.add().CopyFrom(s.states[0]), "declares input 'sum' more than once"),
        (lambda s: setattr(s.states[0], "role", 0), "has no role"),
        (lambda s: s.states[0].ClearField("fill"), "has no initial value"),
        (lambda s: s.states[0].values.CopyFrom(to_message(np.zeros(4, np.float32))), "FP32 [4], the state"),
        (lambda s: s.states[0].values.CopyFrom(tensor_pb2.Tensor(dtype=7, shape=[3])), "damaged"),
        (lambda s: s.states[0].api_axes.extend([0, 1]), "api_axes [0, 1] is not an order"),
        (
            lambda s: s.constants.add(name="rate", value=to_message(np.float32(1)[None])),
            "'rate' is not an input",
        ),
    ],
)
def test_a_spec_that_disagrees_with_its_graph_is_refused(
    tmp_path: Path, change: Change, complaint: str
) -> None:
    step, declared = step_models.read_back(step_models.accumulator())
    change(declared)

    problems = problems_of(tmp_path, step_models.with_spec(step, declared))

    assert any(complaint in problem for problem in problems), problems


def test_every_difference_is_listed(tmp_path: Path) -> None:
    step, declared = step_models.read_back(step_models.accumulator())
    declared.inputs[0].name = "z"
    declared.outputs[0].shape[0] = 9
    declared.states[0].role = model_pb2.STATE_ROLE_UNSPECIFIED

    problems = problems_of(tmp_path, step_models.with_spec(step, declared))

    assert len(problems) == 4


def test_a_constant_of_another_type_is_refused(tmp_path: Path) -> None:
    step, declared = step_models.read_back(step_models.many_layouts())
    declared.constants[0].value.CopyFrom(to_message(np.zeros(2, np.int64)))

    problems = problems_of(tmp_path, step_models.with_spec(step, declared))

    assert any("'rate' is INT64 in the spec and FP32 in the graph" in problem for problem in problems)
    assert any("'rate' has shape [2] in the spec and [] in the graph" in problem for problem in problems)


@pytest.mark.parametrize("dtype", [99, -1])
def test_initial_values_of_a_type_that_there_is_not_are_refused(tmp_path: Path, dtype: int) -> None:
    step, declared = step_models.read_back(step_models.accumulator())
    declared.states[0].values.dtype = dtype  # type: ignore[assignment]

    problems = problems_of(tmp_path, step_models.with_spec(step, declared))

    assert any(f"its initial values are {dtype} []" in problem for problem in problems)


@pytest.mark.parametrize("reader", [spec.load, draft])
def test_a_file_with_names_that_are_no_text_is_refused(tmp_path: Path, reader: Callable[..., object]) -> None:
    content = (
        step_models.accumulator().replace(b"next_sum", b"next_\xffum").replace(b"test", b"\xff\xfe\xfd\xfc")
    )
    path = step_models.write(tmp_path, content)

    with pytest.raises(ModelFileError, match=r"not text in UTF-8|not a valid ONNX file"):
        reader(path, *(("test", 1) if reader is spec.load else (Hints(),)))


def test_the_metadata_of_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    content = step_models.accumulator().replace(b'"inputs"', b'"inp\xfftm"')

    assert problems_of(tmp_path, content) == (spec.NOT_TEXT,)
