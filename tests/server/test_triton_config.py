"""`python -m server describe --from-triton`: a Triton model directory becomes a model that is served."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ntm.tensor import to_array
from server import triton_config
from server.__main__ import main
from server.model import spec

CONFIG = """
# An accumulator whose START keeps nothing of what was.
name: "accumulator"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
instance_group [ { kind: KIND_CPU } ]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  oldest { max_candidate_sequences: 4 }
  control_input [
    { name: "start" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
    { name: "ready" control [ { kind: CONTROL_SEQUENCE_READY fp32_false_true: [ 0, 1 ] } ] },
    { name: "id" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 } ] }
  ]
  state [
    { input_name: "sum" output_name: "total" data_type: TYPE_FP32 dims: [ 3 ]
      initial_state: { data_type: TYPE_FP32 dims: [ 3 ] INITIAL name: "first" } }
  ]
}
"""


def write(root: Path, initial: str = "zero_data: true", reads_id: bool = False) -> Path:
    """A Triton model: total = (1 - start) sum + ready x; y = total, plus the id where it is read."""
    nodes = [
        helper.make_node("Sub", ["one", "start"], ["keeps"]),
        helper.make_node("Mul", ["sum", "keeps"], ["kept"]),
        helper.make_node("Mul", ["x", "ready"], ["taken"]),
        helper.make_node("Add", ["kept", "taken"], ["total"]),
        helper.make_node("Cast", ["id"], ["id_float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["total", "id_float"], ["y"]),
    ]
    if not reads_id:
        nodes[4:] = [helper.make_node("Identity", ["total"], ["y"])]
    names = {"x": 3, "start": 1, "ready": 1, "sum": 3}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in names.items()]
    inputs.append(helper.make_tensor_value_info("id", TensorProto.INT64, ["batch", 1]))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in ("y", "total")]
    one = numpy_helper.from_array(np.float32(1), "one")
    graph = helper.make_graph(nodes, "step", inputs, outputs, [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (root / "2").mkdir()
    onnx.save(model, root / "2" / "model.onnx")
    (root / "initial_state").mkdir()
    np.array([1, 2, 3], np.float32).tofile(root / "initial_state" / "first.bin")
    config = root / "config.pbtxt"
    config.write_text(CONFIG.replace("INITIAL", initial))
    return config


def describe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["server", "describe", *arguments])
    return main()


def test_a_triton_model_is_published_with_its_states_and_its_control_inputs_as_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "models" / "accumulator" / "1"

    status = describe(monkeypatch, "--from-triton", str(write(tmp_path)), "--publish", str(directory))

    said = capsys.readouterr()
    assert status == 0, said
    found = spec.load(directory / "model.onnx", "accumulator", 1).spec
    assert [tensor.name for tensor in found.inputs] == ["x"]
    assert [(state.input_name, state.output_name, state.fill) for state in found.states] == [
        ("sum", "total", 0)
    ]
    constants = {constant.name: to_array(constant.value).item() for constant in found.constants}
    assert constants == {"start": 0, "ready": 1, "id": 0}
    left = said.out.partition("not carried over:")[2].partition("\n\n")[0]
    assert "instance_group" in left
    assert "--sequence-idle-s 5" in left
    assert "sequence_batching" not in left


def test_initial_values_come_from_the_file_and_a_start_that_says_otherwise_is_sent_with_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, initial='data_file: "first.bin"')
    directory = tmp_path / "models" / "accumulator" / "1"

    status = describe(monkeypatch, "--from-triton", str(config), "--publish", str(directory))

    said = capsys.readouterr()
    assert status == 0, said
    found = spec.load(directory / "model.onnx", "accumulator", 1).spec
    np.testing.assert_array_equal(to_array(found.states[0].values), [1, 2, 3])
    assert [tensor.name for tensor in found.inputs] == ["x", "start"]
    assert "'start' (START)" in said.out.partition("not carried over:")[2]


def test_a_model_that_reads_the_id_of_its_sequence_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe(monkeypatch, "--from-triton", str(write(tmp_path, reads_id=True))) == 1

    assert "CORRID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: 3", "not a Triton model config"),
        ('platform: "tensorrt_plan"', "ONNX"),
        ("", "no fields"),
        ('name: "x"', "name the ONNX file"),
        ('name: "x" input { dims: 99999999999999999999 }', "not a Triton model config"),
        ('name: "x" input { data_type: 4611686018427387904 }', "not a Triton model config"),
        ('name: "x" input ' + "{" * 3000, "nested deeper than 32"),
        ('name: "x" ' + "[" * 3000, "nested deeper than 32"),
    ],
)
def test_a_config_that_is_none_or_of_another_backend_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    config = tmp_path / "config.pbtxt"
    config.write_text(text)

    assert describe(monkeypatch, "--from-triton", str(config)) == 1

    assert said in capsys.readouterr().err


def test_a_control_input_of_a_kind_that_is_unknown_is_an_input_of_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path)
    config.write_text(config.read_text().replace("CONTROL_SEQUENCE_READY", "99"))

    assert describe(monkeypatch, "--from-triton", str(config)) == 0

    assert "'ready' (99), which the model reads, is an input of every step" in capsys.readouterr().out


def test_long_text_in_quotes_takes_memory_in_proportion() -> None:
    text = f'name: "{"x" * 100_000}"'

    tracemalloc.start()
    assert [name for name, _ in triton_config._fields(text)] == ["name"]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak_bytes < 10 * len(text)


@pytest.mark.parametrize(("file", "said"), [("none.bin", "No such file"), ("a\\000b", "null byte")])
def test_a_file_of_initial_values_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, said: str
) -> None:
    config = write(tmp_path, initial=f'data_file: "{file}"')

    assert describe(monkeypatch, "--from-triton", str(config)) == 1

    assert said in capsys.readouterr().err


def test_initial_values_of_another_size_than_their_state_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, initial='data_file: "first.bin"')
    config.write_text(
        config.read_text().replace('state [\n    { input_name: "sum"', 'state [\n    { input_name: "ready"')
    )

    assert describe(monkeypatch, "--from-triton", str(config)) == 1

    assert "state 'ready' has 1 elements, its initial values 3" in capsys.readouterr().err
