"""Ten thousand different forms of output, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.server_process import ServerProcess, running_server

NUM_SCHEMAS = 10_000
WARM_UP = 2_000
MB = 1 << 20


def schema(number: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"field{number}": {"type": "string", "maxLength": 1 + number % 50}},
        "required": [f"field{number}"],
        "additionalProperties": False,
    }


def memory(server: ServerProcess) -> int:
    """Bytes of the front, the engine and the process that checks grammars."""
    front = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (front, *front.children(recursive=True)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.covers("R28")
def test_ten_thousand_schemas_take_no_more_memory_than_the_first_ones(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, "--dtype", "float32", "--num-threads", "1") as server:
        engine, after_warm_up = server.engine.pid, 0
        with server.client() as client:
            for number in range(NUM_SCHEMAS):
                body = {"prompt": "a", "max_tokens": 2, "guided_json": schema(number)}
                response = client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                if number == WARM_UP:
                    after_warm_up = memory(server)
        grown = memory(server) - after_warm_up
        print(f"after {WARM_UP} schemas {after_warm_up / MB:.0f} MB, after {NUM_SCHEMAS} {grown / MB:+.1f} MB")
        assert grown < 30 * MB
        assert server.engine.pid == engine
        server.wait_metric("vllm:kv_cache_usage_perc", 0)
