"""Requests that the OpenAPI document allows and forbids, made by schemathesis, against the real server."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis

from tests.e2e.server_process import ServerProcess, running_server

NUM_REQUESTS = 5000
AT_ONCE = 50
"""Of one operation, before the next one's turn."""
SLOWEST_SECONDS = 30.0


@pytest.mark.covers("R33")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_request_of_five_thousand_breaks_the_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--max-model-len", "256", "--data-dir", str(tmp_path))
    with running_server(tiny_checkpoint, *options) as server:
        engine = server.engine.pid
        statuses = send_requests(server)
        print("answers by status:", dict(sorted(statuses.items())))
        assert server.engine.pid == engine
        with server.client() as client:
            answer = client.post("/v1/completions", json={"prompt": "after all that", "max_tokens": 4})
            assert answer.status_code == 200
        server.wait_metric("vllm:num_requests_running", 0)
        server.wait_metric("vllm:kv_cache_usage_perc", 0)


def send_requests(server: ServerProcess) -> Counter[int]:
    """How many answers had each status. Fails at the first one that is the server's fault."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: Counter[int] = Counter()
    for seed in itertools.count():
        for operation, mode in itertools.product(operations, schemathesis.GenerationMode):
            # There are operations about which nothing can be wrong.
            with suppress(hypothesis.errors.Unsatisfiable):
                send_some(operation, mode, seed, server.url, statuses)
            if statuses.total() >= NUM_REQUESTS:
                return statuses
    raise AssertionError("unreachable")


def send_some(
    operation: Any, mode: schemathesis.GenerationMode, seed: int, url: str, statuses: Counter[int]
) -> None:
    @hypothesis.settings(
        max_examples=AT_ONCE,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(seed)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        answer = case.call(base_url=url, timeout=SLOWEST_SECONDS)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.text[:2000]}"

    send()
