"""docs/adding-a-task.md, followed to the letter in a copy of the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Runs each command as it stands, `python -m MODULE ARGUMENTS`, in one process: loading torch takes seconds.
PROGRAM = """
import runpy, sys
for command in sys.argv[1:]:
    python, minus_m, module, *arguments = command.split()
    assert (python, minus_m) == ("python", "-m")
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def test_a_task_that_is_added_as_the_page_says_trains_evaluates_plots_and_exports(tmp_path):
    page = (ROOT / "docs" / "adding-a-task.md").read_text()
    task, listing = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [toml] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    [commands] = re.findall(r"## 4\. Use it\n\n```\n(.*?)```", page, re.DOTALL)
    for package in ("training", "export"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "training" / "tasks" / "reverse.py").write_text(task)
    with (tmp_path / "training" / "tasks" / "__init__.py").open("a") as file:
        file.write(listing)
    (tmp_path / "training" / "configs" / "reverse.toml").write_text(toml)
    small = "--num-updates=2 --model.memory-rows=12 --task.max-length=3 --evaluation.long-sizes=5"
    small += " --evaluation.num-sequences=2 --evaluation.num-long-sequences=2 --batch-size=2"
    lines = [
        line.replace("-m training reverse", f"-m training reverse {small}") for line in commands.splitlines()
    ]
    # In a copy the kernel would be compiled anew, for some seconds.
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}

    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "reverse" / "memory.gif").exists()
    assert (tmp_path / "models" / "reverse" / "1" / "model.onnx").exists()
