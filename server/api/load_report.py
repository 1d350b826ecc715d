"""The load that a gateway may ask for with each answer, instead of scraping metrics (ORCA).

A client that sends `endpoint-load-metrics-format: TEXT` or `JSON` gets `endpoint-load-metrics` in the
answer's head, with the names that vLLM has there. Source: "Open Request Cost Aggregation" of Envoy's xDS
protocol (xds.data.orca.v3.OrcaLoadReport), its native HTTP encodings. The binary one is left out, as vLLM
leaves it out; an unknown format is passed over.
"""

from __future__ import annotations

import json

from starlette.types import Scope

from server.engine.types import StepStats

FORMAT_HEADER = b"endpoint-load-metrics-format"
REPORT_HEADER = b"endpoint-load-metrics"


def load_headers(scope: Scope, stats: StepStats) -> list[tuple[bytes, bytes]]:
    """The header, if the request asks for it. stats: of the engine's newest step."""
    for name, value in scope["headers"]:
        if name == FORMAT_HEADER:
            report = _report(value.lower(), stats)
            return [] if report is None else [(REPORT_HEADER, report.encode())]
    return []


def _report(form: bytes, stats: StepStats) -> str | None:
    named = {
        "kv_cache_usage_perc": max(stats.kv_usage.values(), default=0.0),
        "num_requests_waiting": float(stats.num_waiting),
    }
    if form == b"text":
        return "TEXT " + ", ".join(f"named_metrics.{name}={value:g}" for name, value in named.items())
    if form == b"json":
        return "JSON " + json.dumps({"named_metrics": named})
    return None
