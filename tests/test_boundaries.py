"""What each part may import: the server and the client run without torch, and without each other's stages."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import importlib, json, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_loaded_by(*packages: str) -> set[str]:
    """Every module in a fresh process that imports all of some packages, and the first name of each."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *packages], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = json.loads(ended.stdout)
    return {*names, *(name.partition(".")[0] for name in names)}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("server", {"torch", "training", "export", "ntm._sync", "matplotlib"}),
        ("ntm", {"torch", "training", "export", "server", "onnx", "onnxruntime", "matplotlib"}),
        (
            "inspector",
            {"torch", "training", "export", "server", "ntm._sync", "onnx", "onnxruntime", "matplotlib"},
        ),
        ("training", {"server", "ntm", "export", "grpc", "onnxruntime"}),
        ("export", {"server", "ntm._sync", "grpc"}),
    ],
)
def test_a_part_loads_nothing_of_the_parts_it_is_to_run_without(package: str, forbidden: set[str]) -> None:
    assert not modules_loaded_by(package) & forbidden


ROOMS = {
    "errors": set(),
    "wait_limit": set(),
    "model": {"errors"},
    "runtime": {"errors", "model"},
    "engine": {"errors", "model", "runtime", "wait_limit"},
    "storage": {"errors", "model", "runtime"},
    "security": {"errors"},
    "sessions": {"errors", "engine", "runtime", "storage", "model"},
    "metrics": {"engine", "runtime", "sessions", "storage"},
    "rpc": {"errors", "sessions", "model", "security", "storage", "metrics", "wait_limit"},
}
"""What each package of the server may import of the others; only what puts them together may import all."""


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_servers_packages_import_downwards_only(room: str) -> None:
    package = ROOT / "server" / room
    files = [*package.rglob("*.py")] if package.is_dir() else [package.with_suffix(".py")]

    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("server."):
                imported.add((node.module or "").split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "server":
                imported.update(alias.name for alias in node.names)

    assert imported - {room} <= ROOMS[room]
