"""The project's compose files under a name and on ports of their own, so that nothing else is touched."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntm import Tls
from tests.conftest import ROOT
from tests.valkey import free_port

PATIENCE_S = 90.0


def docker(*args: str, check: bool = True) -> str:
    """Run docker; returns what it printed, to either output."""
    ended = subprocess.run(
        ["docker", *args], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert not check or ended.returncode == 0, f"docker {' '.join(args)}: {ended.stdout}{ended.stderr}"
    return ended.stdout + ended.stderr


class Compose:
    """One project of the compose files."""

    def __init__(self, name: str, secrets: Path, **settings: str) -> None:
        """Args:
        name: of the project: what it makes is named after it, and taken down by it.
        secrets: the directory of secret files.
        settings: variables of .env.example.
        """
        self.name = name
        self._secrets = secrets
        self.port, self.router_port = free_port(), free_port()
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("NTM_", "COMPOSE_"))},
            "COMPOSE_PROJECT_NAME": name,
            "COMPOSE_DISABLE_ENV_FILE": "1",
            "NTM_PORT": str(self.port),
            "NTM_ROUTER_PORT": str(self.router_port),
            "NTM_SECRETS": str(secrets),
            **settings,
        }

    @property
    def credentials(self) -> dict[str, Any]:
        """What a client of this project is given beside the address."""
        token = (self._secrets / "token").read_text()
        return {"tls": Tls(self._secrets / "authority.pem"), "token": token}

    @property
    def address(self) -> str:
        """Of the one server."""
        return f"127.0.0.1:{self.port}"

    @property
    def router_address(self) -> str:
        """Of the router before the replicas."""
        return f"127.0.0.1:{self.router_port}"

    def run(self, *args: str, check: bool = True, files: tuple[str, ...] = ()) -> str:
        """Run docker compose on this project; returns what it printed."""
        named = [part for file in ("docker-compose.yml", *files) for part in ("-f", file)]
        command = ["docker", "compose", *named, "--progress", "quiet", *args]
        ended = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert not check or ended.returncode == 0, f"{' '.join(command)}: {ended.stdout}{ended.stderr}"
        return ended.stdout + ended.stderr

    def shell(self, *command: str) -> str:
        """Run any command where this project is the one that docker compose means; returns what it printed."""
        ended = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stdout}{ended.stderr}"
        return ended.stdout + ended.stderr

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers that run, oldest first."""
        listed = docker(
            "ps",
            "--quiet",
            "--no-trunc",
            "--filter",
            f"label=com.docker.compose.project={self.name}",
            "--filter",
            f"label=com.docker.compose.service={service}",
            "--filter",
            "label=com.docker.compose.oneoff=False",
        )
        return listed.split()[::-1]

    def down(self) -> None:
        """Take everything down, volumes too."""
        self.run("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")


def crash_server(container: str) -> None:
    """SIGKILL the server inside its container: a crash, after which the restart policy holds."""
    code = (
        "import os, signal, pathlib;"
        "os.kill(int(pathlib.Path('/proc/1/task/1/children').read_text().split()[0]), signal.SIGKILL)"
    )
    docker("exec", container, "python", "-c", code)


def inspect(container: str) -> dict[str, Any]:
    """What docker knows of a container."""
    described: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return described


def health(container: str) -> str:
    """`healthy`, `unhealthy` or `starting`."""
    return str(inspect(container)["State"]["Health"]["Status"])


def wait_until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Ask again until it holds; returns the seconds it took."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < patience_s, f"not in {patience_s:.0f} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - start_s
