"""Writes the Grafana dashboard (`make docs`): rows of panels, each a title, a unit and its queries."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent.parent / "deploy/observability/grafana/dashboards/gemma-server.json"
_DATASOURCE = {"type": "prometheus", "uid": "$datasource"}
_MODEL = 'model_name=~"$model_name",instance=~"$instance"'
_SERVER = 'instance=~"$instance"'
_PANELS_IN_A_ROW = 4
_WIDTH, _HEIGHT = 24 // _PANELS_IN_A_ROW, 7


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """As Grafana calls it."""
    queries: tuple[tuple[str, str], ...]
    """Legend and expression."""
    kind: str = "timeseries"


def _rate(counter: str, by: str = "", where: str = _MODEL) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({counter}{{{where}}}[$__rate_interval]))"


def _quantiles(histogram: str, where: str = _MODEL) -> tuple[tuple[str, str], ...]:
    buckets = _rate(f"{histogram}_bucket", "le", where)
    return tuple((f"p{q * 100:g}", f"histogram_quantile({q}, {buckets})") for q in (0.5, 0.95, 0.99))


def _mean(histogram: str, where: str = _MODEL) -> str:
    return f"{_rate(f'{histogram}_sum', '', where)} / {_rate(f'{histogram}_count', '', where)}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Objectives": (
        Panel(
            "First tokens within 2.5 s, 1 h",
            "percentunit",
            (("kept", "1 - gemma:ttft_missed:ratio1h"),),
            "stat",
        ),
        Panel("Failed requests, 1 h", "percentunit", (("5xx", "gemma:http_errors:ratio1h"),), "stat"),
        Panel("Ready replicas", "none", (("loaded", f"sum(gemma_model_loaded{{{_SERVER}}})"),), "stat"),
        Panel(
            "Alerts firing", "none", (("alerts", 'count(ALERTS{alertstate="firing"}) or vector(0)'),), "stat"
        ),
    ),
    "Latency": (
        Panel("Time to first token", "s", _quantiles("vllm:time_to_first_token_seconds")),
        Panel("Inter-token latency", "s", _quantiles("vllm:inter_token_latency_seconds")),
        Panel("Whole request", "s", _quantiles("vllm:e2e_request_latency_seconds")),
        Panel(
            "Where the time goes",
            "s",
            tuple(
                (part, _mean(f"vllm:request_{part}_time_seconds")) for part in ("queue", "prefill", "decode")
            ),
        ),
    ),
    "Traffic": (
        Panel(
            "Tokens a second",
            "none",
            (
                ("prompt", _rate("vllm:prompt_tokens_total")),
                ("generated", _rate("vllm:generation_tokens_total")),
            ),
        ),
        Panel(
            "Sequences a second, by end",
            "reqps",
            (("{{finished_reason}}", _rate("vllm:request_success_total", "finished_reason")),),
        ),
        Panel(
            "HTTP answers a second",
            "reqps",
            (("{{code}}", _rate("gemma_http_requests_total", "code", _SERVER)),),
        ),
        Panel(
            "Refused a second, by reason",
            "reqps",
            (("{{reason}}", _rate("gemma_requests_rejected_total", "reason", _SERVER)),),
        ),
    ),
    "Engine": (
        Panel(
            "Sequences",
            "none",
            (
                ("running", f"sum(vllm:num_requests_running{{{_MODEL}}})"),
                ("waiting", f"sum(vllm:num_requests_waiting{{{_MODEL}}})"),
            ),
        ),
        Panel("KV cache in use", "percentunit", (("{{instance}}", f"vllm:kv_cache_usage_perc{{{_MODEL}}}"),)),
        Panel(
            "Step",
            "s",
            (
                *_quantiles("gemma_engine_step_seconds", _SERVER),
                ("mean", _mean("gemma_engine_step_seconds", _SERVER)),
                ("mean wait for the device", _mean("gemma_engine_wait_seconds", _SERVER)),
            ),
        ),
        Panel("Tokens in a step", "none", (("mean", _mean("vllm:iteration_tokens_total")),)),
        Panel(
            "Prompt tokens from the prefix cache",
            "percentunit",
            (
                (
                    "hit",
                    f"{_rate('vllm:prefix_cache_hits_total')} / {_rate('vllm:prefix_cache_queries_total')}",
                ),
            ),
        ),
        Panel("Preemptions a second", "none", (("preempted", _rate("vllm:num_preemptions_total")),)),
        Panel(
            "Guessed tokens a second",
            "none",
            (
                ("guessed", _rate("vllm:spec_decode_num_draft_tokens_total")),
                ("right", _rate("vllm:spec_decode_num_accepted_tokens_total")),
            ),
        ),
        Panel("Open streams", "none", (("open", f"sum(gemma_sse_open_streams{{{_SERVER}}})"),)),
    ),
    "Life": (
        Panel("Loading took", "s", (("{{instance}}", f"gemma_model_load_seconds{{{_SERVER}}}"),), "stat"),
        Panel(
            "Stages of the start",
            "s",
            (("{{stage}}", f"max by (stage) (gemma_startup_seconds{{{_SERVER}}})"),),
            "stat",
        ),
        Panel("Draining", "none", (("replicas", f"sum(gemma_draining{{{_SERVER}}})"),), "stat"),
        Panel(
            "Engines replaced, 1 h",
            "none",
            (("{{cause}}", f"sum by (cause) (increase(gemma_engine_restarts_total{{{_SERVER}}}[1h]))"),),
        ),
        Panel(
            "Memory",
            "bytes",
            (
                ("front", f"sum(process_resident_memory_bytes{{{_SERVER}}})"),
                ("engine", f"sum(gemma_engine_process_resident_memory_bytes{{{_SERVER}}})"),
            ),
        ),
    ),
}


def dashboard() -> str:
    """The text of the file."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "type": "row",
                "title": title,
                "id": len(panels) + 1,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        y += 1
        for index, panel in enumerate(row):
            line, column = divmod(index, _PANELS_IN_A_ROW)
            place = {"x": column * _WIDTH, "y": y + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        y += -(-len(row) // _PANELS_IN_A_ROW) * _HEIGHT
    content = {
        "uid": "gemma-server",
        "title": "Gemma serving",
        "description": "Written by `make docs` from tools/gen_dashboard.py.",
        "tags": ["gemma"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [_datasource_variable(), _variable("model_name"), _variable("instance")]},
        "panels": panels,
    }
    return json.dumps(content, indent=1) + "\n"


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": expression, "legendFormat": legend}
        for index, (legend, expression) in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "id": number,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {},
        "targets": targets,
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(label: str) -> dict[str, Any]:
    query = f"label_values(vllm:num_requests_running, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": label},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main() -> None:
    DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
    DASHBOARD.write_text(dashboard(), encoding="utf-8")
    print(f"wrote {DASHBOARD}", file=sys.stderr)


if __name__ == "__main__":
    main()
