"""The file: names, shapes, one file, nothing of the machine it was made on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.onnx_file import write_onnx
from export.spec import run_spec
from export.step import CellStep, Step
from tests.export.conftest import write_run
from training.checkpoint import BEST, load, restore_cell

STATES = {
    "memory": [5, 12],
    "read_weightings": [1, 12],
    "write_weightings": [1, 12],
    "read_vectors": [1, 5],
    "controller_hidden": [9],
    "controller_cell": [9],
}


def dims(value) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def write(tmp_path: Path, *overrides: str) -> tuple[Path, Step]:
    content = load(write_run(tmp_path / "run", *overrides) / BEST)
    cell, settings = restore_cell(content)
    step = CellStep(cell)
    write_onnx(step, run_spec("small", step, content, settings), tmp_path / "model.onnx")
    return tmp_path / "model.onnx", step


def test_the_graph_takes_input_and_state_and_gives_output_and_next_state(model_file):
    graph = onnx.load(model_file).graph

    assert {value.name: dims(value) for value in graph.input} == {
        "input": ["batch", 4],
        **{name: ["batch", *shape] for name, shape in STATES.items()},
    }
    assert {value.name: dims(value) for value in graph.output} == {
        "output": ["batch", 3],
        **{f"next_{name}": ["batch", *shape] for name, shape in STATES.items()},
    }


def test_the_weights_are_in_the_file_itself(model_file):
    assert [path.name for path in model_file.parent.iterdir()] == ["model.onnx"]
    weights = onnx.load(model_file, load_external_data=False).graph.initializer
    assert weights
    assert not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in weights)


def test_the_file_says_nothing_of_the_machine_it_was_made_on(model_file):
    content = model_file.read_bytes()

    assert str(Path(__file__).parents[2]).encode() not in content
    assert b".py" not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize(
    "kind",
    [
        ["--model.controller=feedforward", "--model.num-read-heads=2", "--model.num-write-heads=3"],
        ["--model.initial-memory=learned", "--model.initial-attention=learned", "--model.shift-reach=2"],
    ],
)
def test_other_kinds_of_cell_are_exported_with_their_states(tmp_path, kind):
    path, step = write(tmp_path, *kind)

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    state = {name: tensor.numpy() for name, tensor in step.initial_state(3).items()}
    inputs = np.random.default_rng(0).random((3, 4), dtype=np.float32)
    results = session.run(step.output_names, {"input": inputs, **state})

    with torch.no_grad():
        expected = step(torch.from_numpy(inputs), *step.initial_state(3).values())
    for result, ours in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, ours.numpy(), atol=1e-5)


def test_the_graph_keeps_the_floors_so_an_all_zero_state_gives_finite_numbers(model_file):
    session = ort.InferenceSession(model_file, providers=["CPUExecutionProvider"])
    zeros = {value.name: np.zeros([2, *value.shape[1:]], np.float32) for value in session.get_inputs()}

    for result in session.run(None, zeros):
        assert np.isfinite(result).all()
