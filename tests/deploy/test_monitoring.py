"""What a real Prometheus makes of a real server: `make observe-check`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.monitoring import RATE_INTERVAL, load, monitored, stopped, wait_for
from tests.deploy.test_metric_names import rules
from tests.e2e.server_process import free_port
from tools.draw_dashboard import draw, filled_in
from tools.gen_dashboard import DASHBOARD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs `apt-get install prometheus`"),
]


def queries() -> list[str]:
    panels: list[Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [filled_in(target["expr"], RATE_INTERVAL) for panel in panels for target in panel.get("targets", ())]


def test_prometheus_sees_what_the_rules_and_the_dashboard_ask_for(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--dtype", "float32", "--num-threads", "1", "--speculative-ngram-tokens", "5")
    with monitored(str(tiny_checkpoint), tmp_path, free_port(), *options) as (server, prometheus):
        with load(server, 8):
            wait_for("a scrape", lambda: bool(prometheus.query("vllm:generation_tokens_total > 0")), 30)
            recorded = [rule["record"] for rule in rules() if "record" in rule]

            def unanswered() -> list[str]:
                return [query for query in [*recorded, *queries()] if not prometheus.query(query)]

            wait_for("an answer to each query", lambda: not unanswered(), 120)
            names = prometheus.get("label/__name__/values")
            assert "vllm:num_requests_running" in names
            assert not [name for name in names if name.startswith("vllm_")]
            print(f"{len(names)} names, {len(recorded)} recording rules and {len(queries())} queries answered")
            assert not prometheus.firing()
            # Its silence is noticed after 3 s, and ends it after 90.
            with stopped(server):
                fired = wait_for("the alert to fire", lambda: prometheus.firing() == {"GemmaEngineStalled"}, 80)
            resolved = wait_for("the alert to be resolved", lambda: not prometheus.firing(), 80)
            print(f"GemmaEngineStalled fired after {fired:.1f} s and was resolved after {resolved:.1f} s")
        if shutil.which("chromium") is not None:
            draw(prometheus.url, tmp_path / "dashboard.png", seconds=60, rate_interval=RATE_INTERVAL)
            assert (tmp_path / "dashboard.png").stat().st_size > 20_000
