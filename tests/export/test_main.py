"""Exporting from the command line: a version appears whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from export import publish
from export.__main__ import main
from export.errors import VerificationError
from export.onnx_file import read_spec
from export.verification import Report
from tests.export.conftest import write_run
from training import checkpoint
from training.checkpoint import BEST, LAST


def refusal(capsys, run_dir: Path, target: Path) -> str:
    assert main([str(run_dir), str(target)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def everything_under(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_an_existing_version_is_refused_and_left_alone(capsys, run_dir, model_file):
    before = model_file.read_bytes()

    assert "versions are never overwritten" in refusal(capsys, run_dir, model_file.parent)

    assert model_file.read_bytes() == before
    assert everything_under(model_file.parent.parent) == [model_file.parent, model_file]


def test_the_best_checkpoint_is_exported_and_named_in_the_report(capsys, run_dir, tmp_path, monkeypatch):
    """Not the last, which a run that was stopped early may have left anywhere."""
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    checkpoint.save(checkpoint.load(run / BEST)._replace(update=99), run / LAST)
    exported = []
    monkeypatch.setattr(
        publish, "write_onnx", lambda _step, spec, path: (exported.append(spec), path.touch())
    )
    monkeypatch.setattr(publish, "verify", lambda *_arguments, **_options: Report(1, 1, 1, {}))

    assert main([str(run), str(tmp_path / "models" / "m" / "1")]) == 0

    assert exported[0].provenance.metrics["training_updates"] == 10
    assert "after update 10: wrong bits 2.5" in capsys.readouterr().out


def test_as_many_rows_as_are_asked_for_are_exported_and_verified(run_dir, tmp_path):
    target = tmp_path / "models" / "large" / "1"

    assert main([str(run_dir), str(target), "--memory-rows", "64"]) == 0

    spec = read_spec(onnx.load(target / "model.onnx"))
    assert {state.input_name: list(state.shape) for state in spec.states if 64 in state.shape} == {
        "memory": [5, 64],
        "read_weightings": [1, 64],
        "write_weightings": [1, 64],
    }
    assert spec.provenance.training_config["model"]["memory_rows"] == 12


def test_other_rows_than_those_it_was_trained_with_are_refused_where_each_has_its_own_start(capsys, tmp_path):
    run = write_run(tmp_path / "run", "--model.initial-memory=learned")

    assert main([str(run), str(tmp_path / "models" / "m" / "1"), "--memory-rows=64"]) == 1

    assert "--memory-rows 64: the memory at the start is learned for each row" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_file_where_the_models_folder_should_be_is_refused(capsys, run_dir, tmp_path):
    (tmp_path / "models").write_text("notes")

    assert "a file is in the way" in refusal(capsys, run_dir, tmp_path / "models" / "m" / "1")


def test_a_run_directory_without_a_checkpoint_is_refused(capsys, tmp_path):
    assert "has no checkpoint best.pt: train there first" in refusal(
        capsys, tmp_path / "none", tmp_path / "models" / "m" / "1"
    )
    assert everything_under(tmp_path) == []


def test_a_truncated_checkpoint_is_refused(capsys, run_dir, tmp_path):
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / BEST).write_bytes((run_dir / BEST).read_bytes()[:1000])

    assert "is truncated, or not a checkpoint" in refusal(capsys, broken, tmp_path / "models" / "m" / "1")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "target",
    ["models/m/one", "models/m/0", "models/m/-1", "models/.m/1", "models/a b/1", f"models/{'m' * 129}/1"],
)
def test_a_target_that_is_not_a_version_directory_is_refused(capsys, run_dir, tmp_path, target):
    refusal(capsys, run_dir, tmp_path / target)

    assert everything_under(tmp_path) == []


@pytest.mark.parametrize("failing", ["write_onnx", "verify", "_move"])
def test_when_any_stage_fails_nothing_is_left(capsys, run_dir, tmp_path, monkeypatch, failing):
    def write_something(_step, _spec, path):
        path.write_bytes(b"a file")

    def fail(*_arguments, **_options):
        raise VerificationError("it does not hold")

    monkeypatch.setattr(publish, "write_onnx", write_something)
    monkeypatch.setattr(publish, "verify", lambda *_arguments, **_options: None)
    monkeypatch.setattr(publish, failing, fail)

    assert "it does not hold" in refusal(capsys, run_dir, tmp_path / "models" / "m" / "1")
    assert everything_under(tmp_path) == []
