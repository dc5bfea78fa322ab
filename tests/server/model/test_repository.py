"""The models directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import ModelRepositoryError
from server.model import repository
from tests import step_models


def test_every_version_of_every_model_is_found_and_exports_in_progress_are_not(tmp_path: Path) -> None:
    for name, version in (("a", 1), ("a", 12), ("b-2.0", 3)):
        step_models.write(tmp_path, step_models.accumulator(), name, version)
    unfinished = tmp_path / "a" / ".2.partial" / "model.onnx"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half")
    (tmp_path / "README.md").write_text("notes")

    assert [model.label for model in repository.load_all(tmp_path).values()] == ["a/1", "a/12", "b-2.0/3"]


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRepositoryError, match="there is no models directory"):
        repository.load_all(tmp_path / "nowhere")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRepositoryError, match="holds no model"):
        repository.load_all(tmp_path)


@pytest.mark.parametrize(
    ("name", "version", "complaint"),
    [
        ("a b", "1", "not a model name"),
        ("a", "latest", "not a version"),
        ("a", "0", "not a version"),
        ("a", "01", "not a version"),
    ],
)
def test_names_and_versions_must_be_well_formed(
    tmp_path: Path, name: str, version: str, complaint: str
) -> None:
    path = tmp_path / name / version / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(step_models.accumulator())

    with pytest.raises(ModelRepositoryError, match=complaint):
        repository.load_all(tmp_path)


def test_all_models_that_cannot_be_served_are_named_at_once(tmp_path: Path) -> None:
    first = step_models.write(tmp_path, b"junk", "first")
    step_models.write(tmp_path, step_models.accumulator(), "good")
    second = step_models.write(tmp_path, b"junk", "second")

    with pytest.raises(ModelRepositoryError) as caught:
        repository.load_all(tmp_path)

    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    assert "good" not in str(caught.value)
