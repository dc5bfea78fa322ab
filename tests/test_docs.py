"""What the documents say is so: every setting, error and metric stands in docs/serving.md, and the examples run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from server.metrics import Metrics
from server.rpc import status
from server.settings import ServerSettings
from tests.conftest import ROOT, ServerProcess

README = (ROOT / "README.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()


def first_cells(heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading of docs/serving.md, by their first cell."""
    section = SERVING.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {f"{row[0].strip(' `')}{i}": [cell.strip(" `") for cell in row] for i, row in enumerate(rows)}


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {row[0]: row[1] for row in first_cells("Settings").values()}

    assert list(documented) == list(ServerSettings.model_fields)
    for name, field in ServerSettings.model_fields.items():
        default = "not set" if field.default is None else f"{field.default}".removesuffix(".0")
        assert documented[name] == default, name


def test_every_error_is_documented_with_its_code() -> None:
    documented = {(row[0], row[1]) for row in first_cells("Errors").values()}

    expected = {(code.name, reason) for code, reason in status._TABLE.values()} | {("INTERNAL", "BUG")}
    assert documented == expected


@pytest.mark.parametrize(("heading", "triton"), [("Metrics", False), ("Triton's metrics", True)])
def test_every_metric_is_documented(heading: str, triton: bool) -> None:
    documented = {row[0] for row in first_cells(heading).values()}
    if triton:
        documented |= {row[0] for row in first_cells("Metrics").values()}

    exposed = generate_latest(Metrics(triton=triton).registry).decode()
    names = re.findall(r"^# TYPE (\w+) (\w+)$", exposed, re.MULTILINE)
    assert documented == {name for name, _ in names if not name.endswith("_created")}


def commands(section: str) -> list[list[str]]:
    """The shell commands of a section of the README, without their comments."""
    text = README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the README in this environment, whatever its name for the interpreter."""
    command = [sys.executable if part == ".venv/bin/python" else part for part in command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("command", [c for s in ("Train", "Serve") for c in commands(s) if "--help" in c])
def test_the_readmes_help_commands_say_what_there_is(command: list[str]) -> None:
    ended = run(command)

    assert ended.returncode == 0, ended.stderr
    assert "--" in ended.stdout


def test_the_readmes_training_and_export_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In smaller: the paths are temporary ones, and settings are added that make it a matter of seconds."""
    tiny = ["--num-updates=1", "--model.memory-rows=12", "--model.row-width=5", "--model.controller-size=9"]
    tiny += ["--task.num-bits=3", "--task.max-length=4", "--evaluation.long-sizes=5"]
    ran = []
    for command in commands("Train") + commands("Export"):
        if command[0] == "make" or "--help" in command:
            continue
        command = [part.replace("runs/", f"{tmp_path}/") for part in command]
        command = [part.replace("models/", f"{tmp_path}/models/") for part in command]
        if "evaluate" in command:
            command = [*command[: command.index("--memory-rows")], "--memory-rows=16", "--sizes=6"]
        elif "training" in command:
            command += ["--num-updates=2"] if "--resume" in command else tiny
        ended = run(command)
        assert ended.returncode == 0, ended.stderr
        ran.append(command[2])

    assert ran == ["training", "training", "training", "export"]
    assert (tmp_path / "models" / "copy" / "2" / "model.onnx").exists()


def test_make_train_is_the_command_beside_it() -> None:
    beside = (
        next(line for line in README.splitlines() if "the same, by its own" in line).partition("#")[0].strip()
    )

    assert beside in run(["make", "--dry-run", "train"]).stdout


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)) | {"check", "proto", "lock"})
)
def test_the_make_targets_exist(target: str) -> None:
    assert run(["make", "--dry-run", target]).returncode == 0


def test_the_readmes_python_recalls_a_sequence(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(ROOT / "models")
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = program.replace("127.0.0.1:50051", server.address)

    ended = run([sys.executable, "-c", program])

    assert ended.returncode == 0, ended.stderr
    assert set(re.findall(r"-?\d", ended.stdout)) == {"0"}


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_demo_recalls_every_bit(tmp_path: Path) -> None:
    ended = run([sys.executable, "demo.py"])

    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = re.findall(r"│\s*(\d+)\s*│\s*(\d+)\s*│\s*(\d+)\s*│\s*(\d+)\s*│", ended.stdout)
    assert [(int(length), int(errors)) for length, _, _, errors in rows] == [(20, 0), (100, 0), (1000, 0)]
    assert (ROOT / "out" / "demo.png").stat().st_size > 10_000
