"""The configuration as the programs that read it see it: compose, Envoy, Prometheus."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compose.compose import Compose, docker, wait_until
from tests.conftest import ROOT

pytestmark = [pytest.mark.compose, pytest.mark.timeout(120)]

PROFILES = ("", "train", "scale", "monitoring", "demo", "*")


@pytest.mark.parametrize(
    ("profile", "files"), list(itertools.product(PROFILES, [(), ("docker-compose.gpu.yml",)]))
)
def test_compose_reads_every_profile_and_override_without_a_word(
    start_project: Callable[..., Compose], profile: str, files: tuple[str, ...]
) -> None:
    assert start_project("config").run("--profile", profile, "config", "--quiet", files=files) == ""


def test_compose_reads_the_environment_file_with_every_line_set(
    start_project: Callable[..., Compose], tmp_path: Path
) -> None:
    environment = tmp_path / "env"
    environment.write_text((ROOT / ".env.example").read_text().replace("\n#NTM_", "\nNTM_"))

    said = start_project("config").run("--env-file", str(environment), "--profile", "*", "config", "--quiet")

    assert said == ""


def test_envoy_and_prometheus_accept_their_files() -> None:
    envoy = f"{ROOT}/deploy/envoy:/etc/envoy:ro"
    prometheus = f"{ROOT}/deploy/prometheus:/etc/prometheus:ro"
    compose = (ROOT / "docker-compose.yml").read_text()
    image = {
        name: f"{name}:{compose.partition(f'image: {name}:')[2].split()[0]}"
        for name in (
            "envoyproxy/envoy",
            "prom/prometheus",
        )
    }

    validated = docker(
        *("run", "--rm", "--volume", envoy, image["envoyproxy/envoy"]),
        *("envoy", "--mode", "validate", "-c", "/etc/envoy/envoy.yaml"),
    )
    checked = docker(
        *("run", "--rm", "--volume", prometheus, "--entrypoint", "promtool", image["prom/prometheus"]),
        # The certificates that it names are there in the running container alone.
        *("check", "config", "--syntax-only", "/etc/prometheus/prometheus.yml"),
    )
    rules = docker(
        *("run", "--rm", "--volume", prometheus, "--entrypoint", "promtool", image["prom/prometheus"]),
        *("check", "rules", "/etc/prometheus/alerts.yml"),
    )

    assert "configuration '/etc/envoy/envoy.yaml' OK" in validated
    assert "SUCCESS" in checked
    assert "18 rules found" in rules


def test_prometheus_finds_the_server(start_project: Callable[..., Compose]) -> None:
    project = start_project("watch", NTM_PROMETHEUS_PORT="0")
    project.run("--profile", "monitoring", "up", "--detach", "server", "prometheus")
    code = (
        "import ssl, sys, urllib.request; context = ssl._create_unverified_context();"
        "url = 'https://prometheus:9090/api/v1/query?query=up';"
        "sys.stdout.write(urllib.request.urlopen(url, context=context).read().decode())"
    )
    (server,) = project.containers("server")

    def is_up() -> bool:
        said = docker("exec", server, "python", "-c", code, check=False)
        if not said.startswith("{"):
            return False
        found = json.loads(said)["data"]["result"]
        return [(each["metric"]["job"], each["value"][1]) for each in found] == [("ntm", "1")]

    wait_until(is_up, "Prometheus scrapes the server", patience_s=60)
