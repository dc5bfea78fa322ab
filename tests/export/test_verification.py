"""Verification finds what is wrong with a file, and passes what is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.errors import VerificationError
from export.onnx_file import write_onnx
from export.spec import run_spec
from export.step import CellStep, Step
from export.verification import BATCH_SIZES, task_sequences, verify
from tests.export.conftest import write_run
from training.checkpoint import BEST, load, restore_cell
from training.tasks.copy import CopyTask


@pytest.fixture(scope="module")
def step(run_dir) -> Step:
    return CellStep(restore_cell(load(run_dir / BEST))[0])


TASK = CopyTask(num_bits=3)
SEQUENCES = task_sequences(TASK, [(100,)])


def changed(model_file: Path, tmp_path: Path, change) -> Path:
    model = onnx.load(model_file)
    change(model)
    path = tmp_path / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_good_file_is_reported_with_its_differences(model_file, step):
    report = verify(model_file, step, SEQUENCES)

    assert report.differences.keys() == set(BATCH_SIZES) == {1, 2, 7, 64}
    assert all(max(difference) <= 1e-5 for difference in report.differences.values())
    assert report.num_steps == 201


def test_a_weight_that_is_off_by_a_thousandth_is_found(model_file, step, tmp_path):
    def nudge(model):
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
        weight.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(1e-3), weight.name)
        )

    path = changed(model_file, tmp_path, nudge)

    with pytest.raises(VerificationError, match="differ between ONNX Runtime and torch by"):
        verify(path, step, SEQUENCES)


def test_an_initial_state_that_is_not_the_cells_is_found(model_file, step, tmp_path):
    def nudge(model):
        [entry] = model.metadata_props
        assert '"fill": 9.999999974752427e-07' in entry.value
        entry.value = entry.value.replace('"fill": 9.999999974752427e-07', '"fill": 0.5')

    path = changed(model_file, tmp_path, nudge)

    with pytest.raises(VerificationError, match="initial value of memory in the metadata is not the cell's"):
        verify(path, step, SEQUENCES)


def test_outputs_that_are_swapped_in_the_metadata_are_found(model_file, step, tmp_path):
    """With one head of each kind their weightings have the same shape, so only running it can tell."""

    def swap(model):
        [entry] = model.metadata_props
        parts = entry.value.split("next_read_weightings")
        swapped = [part.replace("next_write_weightings", "next_read_weightings") for part in parts]
        entry.value = "next_write_weightings".join(swapped)

    path = changed(model_file, tmp_path, swap)

    with pytest.raises(
        VerificationError, match="at batch 1, in one step, differ between ONNX Runtime and torch"
    ):
        verify(path, step, SEQUENCES)


def test_a_graph_that_is_not_valid_onnx_is_found(model_file, step, tmp_path):
    def break_it(model):
        model.graph.node[3].op_type = "NoSuchOperator"

    path = changed(model_file, tmp_path, break_it)

    with pytest.raises(VerificationError, match="not valid ONNX"):
        verify(path, step, SEQUENCES)


def test_rows_whose_bits_depend_on_the_batch_are_found(tmp_path):
    # Seventeen rows leave a remainder to scalar code, whose logarithm differs in the last bit.
    content = load(write_run(tmp_path / "run", "--model.memory-rows=17", "--model.num-read-heads=2") / BEST)
    cell, settings = restore_cell(content)
    odd = CellStep(cell)
    write_onnx(odd, run_spec("odd", odd, content, settings), tmp_path / "odd.onnx")

    with pytest.raises(VerificationError, match=r"have other bits than in a batch of 128; .* multiple of 4"):
        verify(tmp_path / "odd.onnx", odd, SEQUENCES)
