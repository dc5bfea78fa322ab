"""Files in every form that people have, served bit for bit as a plain loop of ONNX Runtime runs them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from structlog.testing import capture_logs

from ntm.v1 import model_pb2, tensor_pb2
from server.errors import ModelFileError
from server.model import spec
from server.model.describe import Hints, draft
from server.runtime import provider
from server.runtime.probe import load_runner
from server.runtime.proof import prove
from server.runtime.runner import ModelRunner
from tests import foreign_models, step_models


def runner_of(tmp_path: Path, content: bytes) -> ModelRunner:
    model = spec.load(step_models.write(tmp_path, content), "test", 1)
    return load_runner(model, provider.choose("cpu", 0), num_slots=64, max_batch_size=64)


@pytest.mark.parametrize("kind", foreign_models.KINDS)
def test_a_file_of_each_kind_gives_what_a_plain_loop_gives_alone_and_in_batches(
    tmp_path: Path, kind: str
) -> None:
    make, row_by_row = foreign_models.KINDS[kind]

    runner = runner_of(tmp_path, make())

    assert runner.row_by_row == row_by_row
    assert runner.is_batch_invariant
    assert runner.can_scan
    assert runner.padded_batch_size is None
    proof = prove(runner, num_steps=200)
    assert proof.largest_difference == 0
    assert proof.batch_sizes[-1] == 64


def test_that_rows_are_run_one_after_another_is_said_with_what_it_costs(tmp_path: Path) -> None:
    with capture_logs() as logs:
        runner_of(tmp_path, foreign_models.hard_wired())

    [said] = [entry for entry in logs if "one session at a time" in entry["event"]]
    assert said["step_of_1_ms"] > 0
    assert said["step_of_64_ms"] > 0


def test_that_batches_are_padded_is_said_with_what_it_costs(tmp_path: Path) -> None:
    with capture_logs() as logs:
        runner = runner_of(tmp_path, step_models.size_dependent())

    [said] = [entry for entry in logs if "padded to the largest" in entry["event"]]
    assert said["rows"] == runner.rows_are_run == "together, padded to 64"
    assert said["step_of_1_ms"] > 0


def test_branches_within_branches_run_one_row_after_another(tmp_path: Path) -> None:
    """Of a published model: ONNX Runtime 1.32 crashed as it looked for those that are constant."""
    package = pytest.importorskip("silero_vad", reason="silero-vad is not installed")
    file = Path(package.__file__).parent / "data" / "silero_vad.onnx"
    described = draft(file, Hints(axes={"input": {1: 576}}, constants={"sr": "16000"}))
    model = spec.load(
        step_models.write(tmp_path, step_models.with_spec(onnx.load(file), described.spec)), "test", 1
    )

    runner = ModelRunner(model, provider.choose("cpu", 0), num_slots=8, max_batch_size=8, row_by_row=True)

    assert prove(runner).batch_sizes == [
        1,
        2,
        3,
        7,
        8,
    ]  # within rounding: the loop's own graph has constants folded


def test_rows_that_nothing_proves_independent_are_run_one_after_another(tmp_path: Path) -> None:
    """A step that fails on random inputs, here for want of a row of its table, cannot be measured."""
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    step (float[N,1] x, float[N,1] h) => (float[N,1] y, float[N,1] hn)
    <float[2] table = {1.0, 2.0}, float least = {100.0}, int64[1] first = {0}>
    {
        row = Sub (x, least)
        index = Cast <to = 7> (row)
        looked_up = Gather <axis = 0> (table, index)
        both = ReduceSum <keepdims = 1> (looked_up, first)
        hn = Add (h, both)
        y = Identity (hn)
    }
    """
    one = {"dtype": tensor_pb2.DATA_TYPE_FP32, "shape": [1]}
    declared = model_pb2.ModelSpec(
        inputs=[model_pb2.TensorSpec(name="x", **one)],
        outputs=[model_pb2.TensorSpec(name="y", **one)],
        states=[
            model_pb2.StateSpec(
                input_name="h", output_name="hn", role=model_pb2.STATE_ROLE_OTHER, fill=0.0, **one
            )
        ],
    )

    with capture_logs() as logs:
        runner = runner_of(tmp_path, foreign_models.with_spec(text, declared))

    assert runner.row_by_row
    assert any("could not be measured" in entry["event"] for entry in logs)


def test_a_state_that_grows_is_refused_with_that_word(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="'cache' is growing") as caught:
        runner_of(tmp_path, foreign_models.growing())

    assert "fixed length" in str(caught.value)


def test_outputs_of_another_shape_than_the_spec_says_are_refused(tmp_path: Path) -> None:
    step, declared = step_models.read_back(foreign_models.open_axes())
    step.graph.output[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    declared.outputs[0].shape[0] = 2

    with pytest.raises(
        ModelFileError, match=r"output 'y' is \[1, 2\] by the spec, and a step gives \[1, 1\]"
    ):
        runner_of(tmp_path, step_models.with_spec(step, declared))
