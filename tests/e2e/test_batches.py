"""Batches and a server that ends in the middle of them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import ServerProcess, running_server

OPTIONS = ("--dtype", "float32", "--num-threads", "1", "--batch-concurrency", "2")
NUM_LINES = 12
NUM_TOKENS = 120
BODY = {"prompt": "ab", "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 1, "logprobs": 0}


def requests() -> bytes:
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {**BODY, "seed": number},
        }
        for number in range(NUM_LINES)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def start_batch(client: httpx.Client) -> str:
    file = client.post("/v1/files", files={"file": ("in", requests())}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch_id: str = client.post("/v1/batches", json=body).json()["id"]
    return batch_id


def wait(client: httpx.Client, batch_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
        if condition(batch):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def kill_server(server: ServerProcess) -> None:
    server.process.kill()
    server.wait_exit()


def kill_engine(server: ServerProcess) -> None:
    server.engine.kill()
    assert server.wait_exit() == 70


def terminate(server: ServerProcess) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0


@pytest.mark.parametrize("end", [kill_server, kill_engine, terminate])
def test_a_batch_survives_the_end_of_its_server(
    tiny_checkpoint: Path, tmp_path: Path, end: Callable[[ServerProcess], None]
) -> None:
    options = (*OPTIONS, "--data-dir", str(tmp_path / "data"), "--max-engine-restarts", "0")
    with running_server(tiny_checkpoint, *options) as server, server.client() as client:
        expected = client.post("/v1/completions", json={**BODY, "seed": 5}).json()["choices"]
        batch_id = start_batch(client)
        before = wait(client, batch_id, lambda batch: batch["request_counts"]["completed"] >= 2)
        assert before["status"] == "in_progress"
        end(server)
    with running_server(tiny_checkpoint, *options) as server, server.client() as client:
        batch = wait(client, batch_id, lambda batch: batch["status"] not in ("in_progress", "finalizing"))
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        lines = client.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
        results = [json.loads(line) for line in lines]
        assert [result["custom_id"] for result in results] == [str(number) for number in range(NUM_LINES)]
        assert results[5]["response"]["body"]["choices"] == expected
        # What was finished before was not computed again.
        computed = server.metric("vllm:generation_tokens_total") / NUM_TOKENS
        assert computed <= NUM_LINES - before["request_counts"]["completed"]


def test_a_directory_that_cannot_be_used_ends_the_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = ServerProcess(tiny_checkpoint, *OPTIONS, "--data-dir", str(tmp_path / "file"))
    try:
        assert server.wait_exit(30) == 78
        assert "--data-dir" in server.log
    finally:
        server.close()
