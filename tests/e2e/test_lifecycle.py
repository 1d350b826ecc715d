"""From the open port to the last signal."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server_process import ServerProcess, running_server

OPTIONS = ("--dtype", "float32", "--num-threads", "1")
LONG_STREAM = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}


def read_events(server: ServerProcess, begun: threading.Event, events: list[str]) -> None:
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG_STREAM) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
                begun.set()


def stream_in_background(server: ServerProcess) -> tuple[threading.Thread, list[str]]:
    events: list[str] = []
    begun = threading.Event()
    reader = threading.Thread(target=read_events, args=(server, begun, events))
    reader.start()
    assert begun.wait(30)
    return reader, events


@pytest.mark.covers("E08")
def test_an_engine_that_is_given_up_on_ends_its_streams_with_an_error_and_the_server(
    tiny_checkpoint: Path,
) -> None:
    with running_server(tiny_checkpoint, *OPTIONS, "--max-engine-restarts", "0") as server:
        reader, events = stream_in_background(server)
        server.engine.kill()
        assert server.wait_exit(30) == 70
        reader.join()
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["type"] == "server_error"


@pytest.mark.covers("E02")
def test_an_engine_does_not_outlive_its_front(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, *OPTIONS) as server:
        engine = server.engine
        server.process.kill()
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()


@pytest.mark.covers("L05")
def test_the_port_is_open_before_the_model_is_loaded(tiny_checkpoint: Path) -> None:
    server = ServerProcess(tiny_checkpoint, *OPTIONS)
    try:
        deadline = time.monotonic() + 60
        seen = set()
        url = None
        while 200 not in seen and time.monotonic() < deadline:
            url = url or next((word for word in server.log.split() if word.startswith("http://127.")), None)
            if url is not None:
                assert httpx.get(f"{url}/livez").status_code == 200
                seen.add(httpx.get(f"{url}/startupz").status_code)
        assert seen == {503, 200}
    finally:
        server.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-model-len", "100000"), "--max-model-len 100000 is more than the model's context, 512"),
        (("--dtype", "float16"), "use bfloat16 or float32"),
        (("--kv-cache-memory-bytes", "1000"), "--max-model-len"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    tiny_checkpoint: Path, options: tuple[str, ...], said: str
) -> None:
    server = ServerProcess(tiny_checkpoint, *options)
    try:
        server.assert_refuses(said)
    finally:
        server.close()


def test_a_missing_model_is_said_in_one_line(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "nothing")
    try:
        assert server.wait_exit(60) == 78
        assert "no such file or directory" in server.log
    finally:
        server.close()
