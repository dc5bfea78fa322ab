"""The README's lines on deploying, as they stand; and a model that is trained and exported by the train image."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from ntm import Client
from tests.compose.compose import Compose, docker, wait_until
from tests.conftest import ROOT

pytestmark = [pytest.mark.compose]


@pytest.mark.timeout(300)
def test_the_readmes_lines_on_deploying_run_in_their_order(start_project: Callable[..., Compose]) -> None:
    section = (ROOT / "README.md").read_text().partition("## Deploy\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    project = start_project("readme")

    for line in lines:
        said = project.shell(*line)
        if "demo" in line:
            assert re.findall(r"│ (\d+) +│ \d+ +│ \d+ +│ (\d+) ", said) == [
                ("20", "0"),
                ("100", "0"),
                ("1000", "0"),
            ]

    assert lines[-1] == ["make", "roll"]
    assert len(project.containers("replica")) == 2


@pytest.mark.timeout(900)
def test_a_model_is_trained_exported_into_the_mounted_directory_and_served(
    start_project: Callable[..., Compose], tmp_path: Path
) -> None:
    """In smaller: docs/operations.md trains for minutes."""
    models = tmp_path / "models"
    models.mkdir()
    project = start_project("train", NTM_MODELS=str(models), NTM_USER="12345:12345")
    docker("compose", "--progress", "quiet", "--profile", "train", "build", "train")
    for directory in (tmp_path, models):
        directory.chmod(0o777)
    tiny = ["--num-updates=1", "--model.memory-rows=12", "--model.row-width=5", "--model.controller-size=9"]
    tiny += ["--task.num-bits=3", "--task.max-length=4", "--evaluation.long-sizes=5"]
    train = ("run", "--rm", "train", "training", "copy", "--run-dir", "runs/copy", *tiny)

    project.run(*train)
    project.run("run", "--rm", "train", "export", "runs/copy", "models/copy/1")
    project.run("up", "--detach", "--wait")
    project.run("run", "--rm", "train", "export", "runs/copy", "models/copy/2")

    assert models.joinpath("copy", "2", "model.onnx").stat().st_uid == 12345
    with Client(project.address, **project.credentials) as client:
        wait_until(
            lambda: [model.version for model in client.models()] == [2, 1], "the new version is served"
        )
    compiler = docker("run", "--rm", "--entrypoint", "g++", "ntm-train", "--version")
    assert "Free Software Foundation" in compiler
