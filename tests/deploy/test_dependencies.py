"""What is installed: the versions that are pinned, by their hashes in the images, and what an audit says of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXTRAS = {"server": ["server"], "gpu": ["gpu"], "inspector": ["inspector"], "client": []}
AUDIT = ROOT / "deploy" / "audit.py"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    """Versions by name, of lines such as `name[extra]==1.2`."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==(\S+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def wanted(extra: str) -> set[str]:
    """What an extra of the project names, and those that it takes in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = set()
    for requirement in project["optional-dependencies"][extra]:
        if inner := re.match(r"ntm\[([a-z,]+)\]", requirement):
            names |= {name for each in inner[1].split(",") for name in wanted(each)}
        else:
            names.add(normal(re.match(r"[A-Za-z0-9_.-]+", requirement)[0]))  # type: ignore[index]
    return names


@pytest.mark.parametrize("file", ["server", "gpu", "client", "inspector", "build"])
def test_every_version_that_an_image_installs_has_a_hash_and_is_the_one_that_is_pinned(file: str) -> None:
    text = (ROOT / "requirements" / f"{file}.txt").read_text()
    pins = pinned((ROOT / "constraints.txt").read_text() + (ROOT / "constraints-gpu.txt").read_text())
    pins |= {"setuptools": "80.9.0"}
    only_elsewhere = {"async-timeout"}  # of Python before 3.11.3

    locked = pinned(text)

    assert locked
    assert {n: v for n, v in locked.items() if n not in only_elsewhere} == {
        n: pins[n] for n in locked if n in pins
    }
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked)
    assert all("--hash=sha256:" in block for block in blocks)


@pytest.mark.parametrize("file", EXTRAS)
def test_what_the_project_names_is_locked(file: str) -> None:
    client = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())["project"]["dependencies"]
    names = {normal(re.match(r"[A-Za-z0-9_.-]+", each)[0]) for each in client}  # type: ignore[index]
    for extra in EXTRAS[file]:
        names |= wanted(extra)

    assert names - {"ntm-client"} <= set(pinned((ROOT / "requirements" / f"{file}.txt").read_text()))


def test_the_images_install_what_others_wrote_by_its_hash_alone() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    installs = {
        stage.split()[2]: [line for line in stage.splitlines() if " install " in line and "pip" in line]
        for stage in stages[1:]
    }

    for name in ("build", "build-server", "build-client", "build-inspector"):
        assert installs[name]
        for line in installs[name]:
            assert "--require-hashes" in line or "--no-index --no-deps" in line, line


def audit(tmp_path: Path, said: str, *flags: str) -> tuple[int, str]:
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\necho the index does not answer >&2\n")
    tool.chmod(0o700)
    done = subprocess.run(
        [sys.executable, AUDIT, *flags, tool, "constraints.txt"], capture_output=True, text=True
    )
    return done.returncode, done.stdout


def told(**fields: object) -> str:
    return json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": []} | fields]})


def test_an_audit_that_could_not_be_made_says_so_and_is_no_success(tmp_path: Path) -> None:
    for said in ("", told(skip_reason="not found")):
        status, output = audit(tmp_path, said)
        assert (status, output.startswith("NOT AUDITED: ")) == (3, True)
        status, output = audit(tmp_path, said, "--or-say-so")
        assert (status, output.startswith("NOT AUDITED: ")) == (0, True)


def test_an_audit_that_finds_something_fails_and_names_it_and_one_that_does_not_succeeds(
    tmp_path: Path,
) -> None:
    found = told(vulns=[{"id": "PYSEC-1", "fix_versions": ["2"]}])

    for flags in ([], ["--or-say-so"]):
        assert audit(tmp_path, found, *flags) == (1, "a 1: PYSEC-1, fixed in 2\n")
        assert audit(tmp_path, told(), *flags) == (0, "1 versions without a known vulnerability\n")
