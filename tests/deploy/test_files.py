"""What stands in the files that deploy the server, as far as it shows without a container engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from server.metrics import Metrics
from server.settings import ENV_PREFIX, ServerSettings
from tests.conftest import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
FIXED = {
    "models",
    "listen",
    "metrics_listen",
    "health_listen",
    "store",
    "config",
    "insecure",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "tokens",
}
"""Settings that the image or the compose file sets."""


def test_every_setting_can_be_set_in_the_environment_file() -> None:
    settings = {f"{ENV_PREFIX}{name.upper()}" for name in ServerSettings.model_fields if name not in FIXED}

    assert set(re.findall(r"^#(NTM_SERVER_\w+)=", EXAMPLE, re.MULTILINE)) == settings
    assert set(re.findall(r"^    (NTM_SERVER_\w+):", COMPOSE, re.MULTILINE)) >= settings


def test_the_environment_file_shows_the_defaults() -> None:
    shown = dict(re.findall(r"^#(NTM_\w+)=(.*)$", EXAMPLE, re.MULTILINE))

    for name, field in ServerSettings.model_fields.items():
        if name not in FIXED and name != "log_format":
            default = "" if field.default is None else f"{field.default}".removesuffix(".0")
            assert shown[f"{ENV_PREFIX}{name.upper()}"] == default, name
    composed = COMPOSE + (ROOT / "docker-compose.gpu.yml").read_text()
    for name, default in re.findall(r"\$\{(NTM_\w+):-([^}]*)\}", composed):
        assert shown[name] == default, name


def test_the_environment_file_holds_no_secret() -> None:
    assert not re.search(r"(PASSWORD|TOKEN|KEY|SECRET)=", EXAMPLE)


def metric_names() -> set[str]:
    exposed = generate_latest(Metrics().registry).decode()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", exposed, re.MULTILINE))
    names = set(types)
    for name, kind in types.items():
        if kind == "histogram":
            names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    return names


@pytest.mark.parametrize("path", ["grafana/dashboards/ntm.json", "prometheus/alerts.yml"])
def test_dashboard_and_alerts_ask_for_metrics_that_there_are(path: str) -> None:
    asked = set(re.findall(r"\bntm_\w+", (ROOT / "deploy" / path).read_text()))

    assert asked
    assert asked <= metric_names()


def test_every_panel_of_the_dashboard_has_a_place_a_query_and_the_provisioned_source() -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "ntm.json").read_text())
    source = (ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    (uid,) = re.findall(r"uid: (\w+)", source)

    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["targets"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {uid}


def test_the_router_repeats_after_a_reset_only_what_is_marked_safe() -> None:
    """Its two routes: the first takes marked calls, the second all others."""
    config = (ROOT / "deploy" / "envoy" / "envoy.yaml").read_text()
    marked, _, others = config.partition("- match: {prefix: /}")

    assert "- name: ntm-retry-safe\n                                present_match: true" in marked
    assert re.findall(r"retry_on: (.*)", marked) == ["reset,connect-failure,refused-stream"]
    assert re.findall(r"retry_on: (.*)", others) == ["connect-failure,refused-stream"]
    assert (
        config.count("hash_policy:\n                              - header: {header_name: ntm-routing-key}")
        == 2
    )


def test_no_file_holds_a_secret_or_publishes_beyond_this_machine() -> None:
    published = re.findall(r'^      - "([^"]*:\d+)"$', COMPOSE, re.MULTILINE)

    assert len(published) == 5
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name, value in re.findall(r"(\w*(?:PASSWORD|TOKEN)\w*): (\S+)", COMPOSE):
        assert value.startswith("/run/secrets/"), name


def test_the_kubernetes_example_runs_what_the_compose_files_run() -> None:
    """Its structure is checked against the schemas by `make check`."""
    example = (ROOT / "deploy" / "kubernetes" / "ntm.yaml").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    assert set(re.findall(r"image: (\S+)", example)) == {
        f"ntm-server:{version}",
        *re.findall(r"image: ((?:valkey|envoyproxy)/\S+)", COMPOSE),
    }
    grace_s = int(re.findall(r"terminationGracePeriodSeconds: (\d+)", example)[0])
    assert grace_s > ServerSettings.model_fields["drain_timeout_s"].default
    for wanted in (
        "PodDisruptionBudget",
        "readinessProbe",
        "livenessProbe",
        "startupProbe",
        "runAsNonRoot: true",
    ):
        assert wanted in example
    num_containers = len(re.findall(r"^      containers:$", example, re.MULTILINE))
    assert example.count("readOnlyRootFilesystem: true") == num_containers == 3


def test_the_image_names_this_version() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    assert f'image.version="{version}"' in Path(ROOT / "Dockerfile").read_text()
