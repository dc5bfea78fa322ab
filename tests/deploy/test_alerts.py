"""The alert rules and the dashboard's queries, by Prometheus's own promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "ntm.json"
TAKEN_OUT = ROOT / ".venv" / "prometheus" / "promtool"
PROMTOOL = shutil.which("promtool") or (str(TAKEN_OUT) if TAKEN_OUT.exists() else None)

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None,
    reason="there is no promtool: run `make test` where apt-get has Debian's package prometheus, or install it",
)


def promtool(*arguments: str, cwd: Path = PROMETHEUS) -> None:
    assert PROMTOOL is not None
    ended = subprocess.run(
        [PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_promtool
def test_every_alert_is_told_when_it_should_be_and_none_of_a_server_at_work() -> None:
    promtool("test", "rules", "alerts_test.yml")


@needs_promtool
def test_promtool_finds_no_fault_with_the_rules() -> None:
    promtool("check", "rules", "alerts.yml")


def test_every_alert_has_a_test_that_it_is_told_and_one_that_it_is_not() -> None:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for rule in group["rules"]]
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    told, not_told = list[str](), list[str]()
    for case in tests:
        for asked in case["alert_rule_test"]:
            (told if asked.get("exp_alerts") else not_told).append(asked["alertname"])

    assert sorted(told) == sorted(not_told) == sorted(alerts)


@needs_promtool
def test_every_query_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"query_{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries)
    ]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

    promtool("check", "rules", "queries.yml", cwd=tmp_path)


def test_every_metric_that_tells_of_trouble_is_asked_for() -> None:
    asked = (PROMETHEUS / "alerts.yml").read_text() + DASHBOARD.read_text()

    assert set(re.findall(r"\bntm_\w+", asked)) >= {
        "ntm_refusals_total",
        "ntm_store_read_seconds_bucket",
        "ntm_session_take_overs_total",
        "ntm_thread_alive",
        "ntm_principal_calls_total",
        "ntm_principal_steps_total",
        "ntm_queue_seconds_bucket",
        "ntm_run_seconds_bucket",
    }
