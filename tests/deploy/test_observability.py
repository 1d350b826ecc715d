"""Rules, alerts, runbook and dashboard agree with each other; a real Prometheus reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.deploy.test_metric_names import rules
from tools import gen_dashboard
from tools.gen_rules import ROOT, RULES

OBSERVABILITY = RULES.parent
ALERTS = [rule for rule in rules() if "alert" in rule]

every_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs `apt-get install prometheus`")


@every_alert
def test_an_alert_has_an_entry_in_the_runbook(alert: dict[str, Any]) -> None:
    page, anchor = alert["annotations"]["runbook"].split("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert alert["alert"] in headings
    assert anchor == alert["alert"].lower()
    assert alert["labels"]["severity"] in ("page", "warning")


def test_the_runbook_has_no_entry_of_an_alert_that_there_is_not() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]


@every_alert
def test_an_alert_is_shown_to_fire_and_to_stay_silent(alert: dict[str, Any]) -> None:
    tests = yaml.safe_load((OBSERVABILITY / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    expected = [
        bool(case["exp_alerts"])
        for test in tests
        for case in test["alert_rule_test"]
        if case["alertname"] == alert["alert"]
    ]
    assert sorted(expected) == [False, True]


@promtool
@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")], ids=" ".join
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=OBSERVABILITY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_up_to_date() -> None:
    assert gen_dashboard.DASHBOARD.read_text(encoding="utf-8") == gen_dashboard.dashboard(), "run `make docs`"


@pytest.mark.parametrize("name", ["gemma_startup_seconds", "gemma_engine_wait_seconds"])
def test_the_dashboard_shows_where_time_goes(name: str) -> None:
    assert f"{name}{{" in gen_dashboard.dashboard() or f"{name}_sum{{" in gen_dashboard.dashboard()
