"""What a server does before it serves, seen from outside its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.valkey import free_port


def test_onnx_runtime_is_told_to_report_nothing_before_it_is_imported() -> None:
    code = (
        "import sys, server, os;"
        "assert 'onnxruntime' not in sys.modules;"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}

    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    assert said.stdout.strip() == "1"


def test_a_store_that_is_not_there_is_named_with_its_cause_once_and_without_its_password(
    models: Path,
) -> None:
    url = f"redis://somebody:secret@127.0.0.1:{free_port()}/0"
    flags = ["--models", str(models), "--listen", "127.0.0.1:0", "--store", url, "--log-format", "json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "server", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "waiting for the session store" in line:
            break
    try:
        rest, _ = "", process.communicate(timeout=2.5)
    except subprocess.TimeoutExpired:
        process.kill()
        rest = process.communicate()[1]

    waiting = json.loads(said[-1])
    assert waiting["store"] == url.replace("somebody:secret@", "")
    assert "refused" in waiting["cause"]
    assert "repeat the call" not in waiting["cause"]
    assert "secret" not in "".join(said)
    assert "waiting" not in rest
