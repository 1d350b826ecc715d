"""The server while its engine fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server_process import ServerProcess, running_server
from tests.e2e.test_lifecycle import OPTIONS, stream_in_background


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


@pytest.mark.covers("E01")
def test_an_engine_that_is_killed_is_replaced_and_who_waited_is_answered(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, *OPTIONS) as server, server.client() as client:
        request = {"prompt": "ab", "max_tokens": 5, "temperature": 0}
        expected = client.post("/v1/completions", json=request).json()["choices"]
        reader, events = stream_in_background(server)
        engine = server.engine
        engine.suspend()
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=request, timeout=60))

        waiting = [threading.Thread(target=ask) for _ in range(3)]
        for thread in waiting:
            thread.start()
        time.sleep(0.5)
        engine.kill()
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
        refused = client.post("/v1/completions", json=request)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        until(lambda: client.get("/readyz").status_code == 200)
        for thread in [*waiting, reader]:
            thread.join()
        assert [answer.json()["choices"] for answer in answers] == [expected] * 3
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "engine_lost"
        assert "signal 9: 1 sequences ended with it, 3 wait for the next engine" in server.log
        assert server.metric("gemma_engine_restarts_total") == 1
        assert server.metric("gemma_engine_sequences_rerun_total") == 3
        assert server.metric("vllm:num_requests_running") == 0


@pytest.mark.covers("E10")
def test_nothing_listens_but_the_port(server: ServerProcess) -> None:
    processes = [psutil.Process(server.process.pid), server.engine]
    listening = [
        connection.laddr.port
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [int(server.url.rpartition(":")[2])]
    assert not any(
        connection.laddr for process in processes for connection in process.net_connections(kind="unix")
    )


@pytest.mark.slow
@pytest.mark.covers("E01")
def test_a_batch_without_a_server_survives_the_end_of_its_engine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "ab", "max_tokens": 60, "seed": number, "ignore_eos": True},
        }
        for number in range(400)
    ]
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "server", "run-batch", str(source), str(output)]
    command += ["--model", str(tiny_checkpoint), *OPTIONS, "--no-weight-cache"]
    with subprocess.Popen(command) as process:
        until(lambda: output.exists() and output.read_bytes().count(b"\n") > 20, 90)
        (engine,) = (
            child for child in psutil.Process(process.pid).children() if "server.engine.loop" in child.cmdline()
        )
        engine.kill()
        assert process.wait(100) == 0
    results = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert sorted(int(result["custom_id"]) for result in results) == list(range(400))
    assert {result["response"]["body"]["usage"]["completion_tokens"] for result in results} == {60}
