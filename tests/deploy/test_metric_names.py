"""Whatever reads our metrics reads ones that there are. A wrong name gives no error anywhere, only silence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.api.support import LiveServer
from tests.deploy.objects import of_kind
from tests.deploy.promql import metric_names
from tools.gen_rules import ROOT, RULES
from tools.manifests import Combination

DASHBOARDS = sorted((ROOT / "deploy" / "observability").rglob("*.json"))
OF_OTHERS = re.compile(
    r"up|ALERTS|(kube|container|DCGM|llm_d_epp|inference_pool|inference_objective|istio)_\w+|vllm_num_requests_running"
)
"""Prometheus' own; what Kubernetes, GPUs and endpoint pickers export; and the name that an alert looks for
since we never have it."""
GMP_METRIC = re.compile(r"prometheus\.googleapis\.com\|(?P<name>[\w:]+)\|(?P<kind>gauge|counter|histogram)")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions(panel: Any) -> Iterator[str]:
    """All that a dashboard asks Prometheus for, its variables' queries included."""
    if isinstance(panel, dict):
        for key, value in panel.items():
            if key == "expr" and isinstance(value, str):
                yield value
            elif key == "query" and isinstance(value, str):
                yield from re.findall(r"label_values\(([^,()]+),", value)
            else:
                yield from expressions(value)
    elif isinstance(panel, list):
        for value in panel:
            yield from expressions(value)


@pytest.fixture(scope="module")
def series(running: LiveServer) -> set[str]:
    """Names of all series that a server has after one request."""
    lines = running.http.get("/metrics").text.splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def unknown(expression: str, series: set[str]) -> set[str]:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return {name for name in metric_names(expression) - series - recorded if not OF_OTHERS.fullmatch(name)}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule.get("alert"))
def test_rules_read_metrics_that_there_are(rule: dict[str, Any], series: set[str]) -> None:
    assert metric_names(rule["expr"])
    assert unknown(rule["expr"], series) == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_read_metrics_that_there_are(path: Any, series: set[str]) -> None:
    found = list(expressions(json.loads(path.read_text(encoding="utf-8"))))
    assert found
    assert {expression: names for expression in found if (names := unknown(expression, series))} == {}


def test_autoscalers_read_metrics_that_there_are(series: set[str], running: LiveServer) -> None:
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", running.http.get("/metrics").text, re.MULTILINE))
    scaler = of_kind(Combination("gemma-2b-l4", ("hpa-gmp",)), "HorizontalPodAutoscaler")[0]
    for metric in scaler["spec"]["metrics"]:
        found = GMP_METRIC.fullmatch(metric["pods"]["metric"]["name"])
        assert found is not None
        assert types[found["name"]] == found["kind"]
    scaled = of_kind(Combination("gemma-2b-l4", ("keda",)), "ScaledObject")[0]
    for trigger in scaled["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        assert metric_names(query)
        assert metric_names(query) <= series


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ('sum by (le, pod) (rate(vllm:a_bucket{le="1.0", x=~"y|z"}[5m])) > 20', {"vllm:a_bucket"}),
        ("1 - a:b:ratio5m / on(namespace) group_left(pod) c offset 5m", {"a:b:ratio5m", "c"}),
        ("histogram_quantile(0.95, sum(rate(x_bucket[$__rate_interval])) by (le))", {"x_bucket"}),
        ('absent(up{job="gemma"}) or vector(1e3)', {"up"}),
        ("max_over_time((a > 0 and b)[1h:5m])", {"a", "b"}),
        ('label_replace(a, "x", "$1", "y", "b(.*)")', {"a"}),
        ("count without (pod) (a{}) > bool 0.5", {"a"}),
    ],
)
def test_names_are_found_in_expressions(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names
