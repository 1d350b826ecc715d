"""What an operator sees of a real server: both processes' log, their stacks, their state and their metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import START_SECONDS, running_server

OPTIONS = ("--dtype", "float32", "--num-threads", "1", "--log-level", "debug", "--log-format", "json")
SCHEMA = {"type": "object", "properties": {"PROMPTCANARY": {"type": "integer"}}, "required": ["PROMPTCANARY"]}


class Piped:
    """A server whose log goes to a pipe, which can be closed."""

    def __init__(self, model: Path, keys: Path) -> None:
        keys.write_text(json.dumps([{"name": "admin", "keys": ["KEYCANARY"], "admin": True}]))
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", "0", *OPTIONS]
        command += ["--api-key-file", str(keys)]
        environment = {"GEMMA_SERVER_WEIGHT_CACHE": "false"} | os.environ
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._closing = threading.Event()
        self._reader.start()
        line = self.wait_for("running on http://")
        url = line.partition("running on ")[2].partition(" ")[0]
        self.http = httpx.Client(base_url=url, timeout=60, headers={"authorization": "Bearer KEYCANARY"})
        self.wait_for("serving ")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.decode())
            if self._closing.is_set():
                break
        self.process.stderr.close()

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> str:
        deadline = time.monotonic() + seconds
        while True:
            for line in list(self.lines):
                if text in line:
                    return line
            assert time.monotonic() < deadline, f"{text!r} is not in the log:\n{''.join(self.lines)}"
            time.sleep(0.02)

    def close_log(self) -> None:
        """As when the process that collects the log ends."""
        self._closing.set()
        while self._reader.is_alive():
            self.http.get("/version")  # has a line written, at which the reader leaves


@pytest.fixture(scope="module")
def piped(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Piped]:
    server = Piped(tiny_checkpoint, tmp_path_factory.mktemp("keys") / "keys.json")
    yield server
    server.http.close()
    server.process.kill()
    server.process.wait()


def ask(server: Piped, **fields: Any) -> httpx.Response:
    body = {"prompt": "PROMPTCANARY", "max_tokens": 8, "ignore_eos": True, **fields}
    return server.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})


@pytest.mark.covers("S14")
def test_both_processes_log_json_and_no_text(piped: Piped) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert ask(piped).status_code == 200
    assert ask(piped, response_format=schema, max_tokens=40).status_code == 200
    assert ask(piped, structured_outputs={"regex": "(PROMPTCANARY"}).status_code == 400
    assert ask(piped, temperature="PROMPTCANARY").status_code == 400
    piped.wait_for('"status": 400')
    entries = [json.loads(line) for line in piped.lines]
    assert {entry["process"] for entry in entries} == {"front", "engine"}
    assert {entry.get("request_id") for entry in entries} >= {"mine"}
    assert "CANARY" not in "".join(piped.lines)


def test_a_signal_has_both_processes_print_their_stacks(piped: Piped) -> None:
    first = len(piped.lines)
    piped.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while "".join(piped.lines[first:]).count("(most recent call first)") < 2 or not any(
        "server/engine/loop.py" in line for line in piped.lines[first:]
    ):
        assert time.monotonic() < deadline, "".join(piped.lines[first:])
        time.sleep(0.05)
    assert any("server/__main__.py" in line for line in piped.lines[first:])
    assert ask(piped).status_code == 200


def test_a_stopped_engine_can_still_be_looked_into(piped: Piped) -> None:
    answer = piped.http.get("/debug/engine").json()
    assert answer["engine"]["running"] == []
    engine = answer["front"]["engine_pid"]
    os.kill(engine, signal.SIGSTOP)
    try:
        response = piped.http.get("/debug/engine")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_silent"
    finally:
        os.kill(engine, signal.SIGCONT)
    assert piped.http.get("/debug/engine").status_code == 200
    metrics = piped.http.get("/metrics").text
    resident = {
        line.partition(" ")[0]: float(line.partition(" ")[2])
        for line in metrics.splitlines()
        if "resident_memory_bytes" in line and not line.startswith("#")
    }
    assert set(resident) == {"process_resident_memory_bytes", "gemma_engine_process_resident_memory_bytes"}
    assert len(set(resident.values())) == 2
    assert min(resident.values()) > 1 << 20
    assert "gemma_engine_process_open_fds" in metrics


@pytest.mark.covers("E12")
def test_a_log_that_nobody_reads_any_more_stops_nobody(piped: Piped) -> None:
    piped.close_log()
    for _ in range(20):
        assert ask(piped).status_code == 200
    assert piped.http.get("/readyz").status_code == 200
    piped.process.send_signal(signal.SIGTERM)
    assert piped.process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.covers("L06")
def test_readiness_does_not_flap_under_full_load(tiny_checkpoint: Path) -> None:
    options = ("--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "16")
    with running_server(tiny_checkpoint, *options) as server:
        over = threading.Event()

        def load(number: int) -> None:
            with server.client() as client:
                while not over.is_set():
                    body = {"prompt": "a" * (1 + number * 9), "max_tokens": 200, "ignore_eos": True, "n": 2}
                    client.post("/v1/completions", json=body)

        clients = [threading.Thread(target=load, args=(number,)) for number in range(40)]
        for client in clients:
            client.start()
        try:
            with server.client() as probe:
                deadline = time.monotonic() + 60
                slowest = 0.0
                while time.monotonic() < deadline:
                    started = time.monotonic()
                    assert probe.get("/readyz").status_code == 200
                    assert probe.get("/livez").status_code == 200
                    slowest = max(slowest, time.monotonic() - started)
                    time.sleep(0.1)
                assert server.metric("vllm:num_requests_waiting") > 0, "the load is not full"
        finally:
            over.set()
            for client in clients:
                client.join()
        assert slowest < 1.0, "a probe with a timeout of a second would have failed"
