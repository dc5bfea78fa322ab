"""A model file can be made a run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from torch.testing import assert_close

from export.__main__ import main
from export.publish import MODEL_FILE
from export.restore import restore
from tests.export.conftest import write_run
from training.__main__ import main as training_main
from training.checkpoint import BEST, LAST, load, restore_cell
from training.evaluate import measure

MODELS = Path(__file__).parents[2] / "models"


def assert_same_weights(restored, run_dir):
    ours, theirs = load(restored / BEST), load(run_dir / BEST)
    assert ours.averaged.keys() == theirs.averaged.keys()
    for name, tensor in theirs.averaged.items():
        assert_close(ours.averaged[name], tensor, atol=1e-6, rtol=1e-6, msg=name)


def test_a_run_that_was_exported_comes_back_with_its_weights_settings_and_scores(
    run_dir, model_file, tmp_path
):
    assert main(["restore", str(model_file.parent), str(tmp_path / "run")]) == 0

    assert_same_weights(tmp_path / "run", run_dir)
    restored, original = load(tmp_path / "run" / BEST), load(run_dir / BEST)
    assert restored.settings == original.settings | {"run_dir": str(tmp_path / "run")}
    assert (restored.metrics, restored.update, restored.command) == (
        original.metrics,
        original.update,
        original.command,
    )
    assert load(tmp_path / "run" / LAST).best_score == 42.5


@pytest.mark.parametrize(
    "kind",
    [
        ["--model.num-read-heads=2", "--model.num-write-heads=3", "--model.shift-reach=2"],
        ["--model.initial-memory=learned", "--model.initial-attention=learned", "--model.controller=gru"],
        ["--model.architecture=plain", "--model.controller-layers=2"],
        ["--model.controller=feedforward"],
    ],
)
def test_every_kind_of_cell_comes_back(kind, tmp_path):
    run_dir = write_run(tmp_path / "run", *kind)
    assert main([str(run_dir), str(tmp_path / "models" / "kind" / "1")]) == 0

    assert main(["restore", str(tmp_path / "models" / "kind" / "1"), str(tmp_path / "again")]) == 0

    ours, _ = restore_cell(load(tmp_path / "again" / BEST))
    theirs, settings = restore_cell(load(run_dir / BEST))
    inputs = settings.task.draw(3, (4,), torch.Generator().manual_seed(0)).inputs
    states = ours.initial_state(3), theirs.initial_state(3)
    with torch.no_grad():
        for step_inputs in inputs:
            (our, first), (their, second) = (
                cell.step(step_inputs, state) for cell, state in zip((ours, theirs), states, strict=True)
            )
            states = first, second
            assert_close(our, their, atol=1e-5, rtol=1e-5)


def test_the_shipped_copy_model_is_measured_drawn_and_trained_on(tmp_path):
    run_dir = tmp_path / "shipped"
    restore(MODELS / "copy" / "1" / MODEL_FILE, run_dir)

    cell, settings = restore_cell(load(run_dir / BEST))
    assert measure(cell, settings.task, (40,), 20)["wrong_bits"] == 0
    assert training_main(["evaluate", str(run_dir), "--sizes=10", "--num-sequences=2"]) == 0
    assert training_main(["plot", str(run_dir), "--size=5"]) == 0
    assert (run_dir / "machine.png").exists()
    further = [f"--init-from={run_dir}", f"--run-dir={tmp_path / 'further'}", "--num-updates=1"]
    small = [
        "--evaluation.num-sequences=2",
        "--evaluation.long-sizes=25",
        "--evaluation.num-long-sequences=2",
    ]
    assert training_main(["copy", *further, *small]) == 0
    records = (tmp_path / "further" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[0])["wrong_bits_in_training"] == 0


def test_a_model_is_not_taken_for_a_run_and_it_is_said_how_to_make_one_of_it(capsys):
    assert training_main(["evaluate", str(MODELS / "copy" / "1")]) == 1
    assert training_main(["plot", str(MODELS / "copy" / "1")]) == 1

    said = capsys.readouterr().err
    assert said.count("is a model and not a run: `python -m export restore") == 2


def test_what_cannot_be_restored_is_refused_in_a_sentence(capsys, model_file, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / MODEL_FILE).write_text("no model")
    (tmp_path / "bare").mkdir()
    bare = onnx.load(model_file)
    bare.metadata_props[0].value = '{"name": "bare"}'
    onnx.save(bare, tmp_path / "bare" / MODEL_FILE)
    (tmp_path / "other").mkdir()
    other = onnx.load(model_file)
    [weight] = [tensor for tensor in other.graph.initializer if tensor.name == "module.cell.output.weight"]
    weight.name = "cell.output.gewicht"
    for node in other.graph.node:
        node.input[:] = [
            "cell.output.gewicht" if name == "module.cell.output.weight" else name for name in node.input
        ]
    onnx.save(other, tmp_path / "other" / MODEL_FILE)

    for model, said in [
        ("none", "is no model file"),
        ("text", "is no model file"),
        ("bare", "was not exported from a run"),
        ("other", "weights are of another model"),
    ]:
        assert main(["restore", str(tmp_path / model), str(tmp_path / "run")]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    shutil.copytree(model_file.parent, tmp_path / "model")
    assert main(["restore", str(tmp_path / "model"), str(tmp_path / "text")]) == 1
    assert "exists: choose another run directory" in capsys.readouterr().err
