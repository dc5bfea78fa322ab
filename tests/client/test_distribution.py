"""The distribution ntm-client: its wheel alone is enough to call a server, and brings the module `ntm` alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ntm
from tests.conftest import ROOT, ServerProcess

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

FIND = """
import importlib.util, json
names = ["ntm", "client", "server", "training", "export", "benchmarks", "protos", "clients", "torch", "onnxruntime"]
print(json.dumps([name for name in names if importlib.util.find_spec(name)]))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment that holds the wheel and what the wheel depends on."""
    subprocess.run(["make", "dist", f"DIST={tmp_path}"], cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("ntm_client-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(install, env=ENVIRONMENT, check=True, capture_output=True)
    return python


def run(python: Path, program: str) -> str:
    ended = subprocess.run(
        [python, "-c", program], cwd=python.parent, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.timeout(300)
def test_the_wheel_alone_makes_the_readmes_call_and_brings_no_module_but_ntm(
    python: Path, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(ROOT / "models")
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

    printed = run(python, program.replace("127.0.0.1:50051", server.address))
    found = json.loads(run(python, FIND))

    assert set(re.findall(r"-?\d", printed)) == {"0"}
    assert found == ["ntm"]


def test_every_public_name_is_there() -> None:
    for name in ntm.__all__:
        assert getattr(ntm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        ntm.Klient  # type: ignore[attr-defined]  # noqa: B018


def test_a_type_that_says_what_to_do_catches_those_below_it() -> None:
    assert issubclass(ntm.StepOrderError, ntm.PreconditionError)
    assert issubclass(ntm.NotFoundError, ntm.RefusedError)
    assert issubclass(ntm.DeadlineError, ntm.TransientError)
    assert not issubclass(ntm.InternalError, ntm.RefusedError | ntm.TransientError)
