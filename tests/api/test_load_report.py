"""The load in the head of an answer (ORCA)."""

from __future__ import annotations

import json

import pytest

from server.engine.types import StepStats
from tests.api.support import LiveServer

HEADER = "endpoint-load-metrics"
STATS = StepStats(num_waiting=3, kv_usage={"full": 0.25, "sliding": 0.5})


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("form", ["TEXT", "text", "JSON", "json"])
def test_it_is_in_the_form_that_is_asked_for(server: LiveServer, form: str, stream: bool) -> None:
    server.runtime.metrics.record_step(STATS)
    server.http.headers[f"{HEADER}-format"] = form
    try:
        answer = server.complete(stream=stream)
    finally:
        del server.http.headers[f"{HEADER}-format"]
    assert answer.status_code == 200
    kind, _, report = answer.headers[HEADER].partition(" ")
    assert kind == form.upper()
    if kind == "TEXT":
        named = {name: float(value) for name, value in (pair.split("=") for pair in report.split(", "))}
        assert named == {
            "named_metrics.kv_cache_usage_perc": 0.5,
            "named_metrics.num_requests_waiting": 3.0,
        }
    else:
        assert json.loads(report) == {
            "named_metrics": {"kv_cache_usage_perc": 0.5, "num_requests_waiting": 3.0}
        }


@pytest.mark.parametrize("form", [None, "BIN", "", "\x7f"])
def test_who_does_not_ask_or_asks_for_another_form_gets_none(server: LiveServer, form: str | None) -> None:
    headers = {} if form is None else {f"{HEADER}-format": form}
    answer = server.http.post("/v1/completions", json={"prompt": "ab"}, headers=headers)
    assert HEADER not in answer.headers


def test_refusals_have_it_too(server: LiveServer) -> None:
    answer = server.http.post("/v1/completions", json={}, headers={f"{HEADER}-format": "TEXT"})
    assert answer.status_code == 400
    assert HEADER in answer.headers
