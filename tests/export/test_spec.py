"""The ModelSpec in the file agrees with the graph, the cell and the run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from export.onnx_file import read_spec
from export.spec import initial_value, run_spec
from export.step import CellStep
from ntm.v1 import model_pb2, tensor_pb2
from tests.export.conftest import write_run
from training.checkpoint import BEST, load, restore_cell


@pytest.fixture(scope="module")
def spec(model_file) -> model_pb2.ModelSpec:
    return read_spec(onnx.load(model_file))


def test_the_spec_describes_each_input_and_output_of_the_graph(spec, model_file):
    graph = onnx.load(model_file).graph

    def shape(value):
        return [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]

    inputs = {value.name: shape(value) for value in graph.input}
    outputs = {value.name: shape(value) for value in graph.output}
    assert inputs == {spec.inputs[0].name: spec.inputs[0].shape} | {
        state.input_name: state.shape for state in spec.states
    }
    assert outputs == {spec.outputs[0].name: spec.outputs[0].shape} | {
        state.output_name: state.shape for state in spec.states
    }
    assert all(state.dtype == tensor_pb2.DATA_TYPE_FP32 and state.batch_axis == 0 for state in spec.states)


def test_each_state_has_its_role(spec):
    roles = {state.input_name: model_pb2.StateRole.Name(state.role) for state in spec.states}

    assert roles == {
        "memory": "STATE_ROLE_MEMORY",
        "read_weightings": "STATE_ROLE_READ_WEIGHTING",
        "write_weightings": "STATE_ROLE_WRITE_WEIGHTING",
        "read_vectors": "STATE_ROLE_READ_VECTOR",
        "controller_hidden": "STATE_ROLE_CONTROLLER",
        "controller_cell": "STATE_ROLE_CONTROLLER",
    }


def test_the_memory_is_shown_with_its_rows_first_however_the_graph_keeps_it(spec):
    [memory] = [state for state in spec.states if state.role == model_pb2.STATE_ROLE_MEMORY]

    assert [memory.shape[axis] for axis in memory.api_axes] == [12, 5]


@pytest.mark.parametrize("memory", ["constant", "random", "learned"])
def test_initial_values_are_those_of_the_cell_bit_for_bit(tmp_path, memory):
    content = load(write_run(tmp_path / "run", f"--model.initial-memory={memory}") / BEST)
    cell, settings = restore_cell(content)
    step = CellStep(cell)

    described = run_spec("small", step, content, settings)

    initial = step.initial_state(1)
    for state in described.states:
        np.testing.assert_array_equal(initial_value(state), initial[state.input_name][0].numpy())
    assert described.states[0].WhichOneof("initial") == ("fill" if memory == "constant" else "values")


def test_the_spec_names_the_model_by_its_path_and_tells_how_it_was_made(spec):
    assert (spec.name, spec.task) == ("small", "copy")
    provenance = spec.provenance
    assert provenance.training_command == "python -m training copy --seed 7"
    assert provenance.seed == 7
    assert provenance.training_config["model"]["memory_rows"] == 12
    assert provenance.metrics["wrong_bits_at_120"] == 40
    assert provenance.metrics["training_sequences"] == 160
    assert provenance.library_versions["torch"].startswith("2.")
    assert provenance.export_time.seconds > 0
