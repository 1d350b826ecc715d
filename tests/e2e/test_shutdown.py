"""Signals to the real server, at every time of its life."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server_process import ServerProcess, running_server

OPTIONS = ("--dtype", "float32", "--num-threads", "1")
NEVER_ENDS = 100_000


class Stream(threading.Thread):
    """Reads one stream to its end, whatever that is."""

    def __init__(self, server: ServerProcess, max_tokens: int) -> None:
        super().__init__()
        self._url = server.url
        self._body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self.begun = threading.Event()
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line[6:])
                        self.begun.set()
        except httpx.HTTPError as error:
            self.events.append(repr(error))


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose context no test outlasts."""
    from tests.tiny_checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("long"), context=2 * NEVER_ENDS)


@pytest.mark.covers("L01")
def test_twenty_streams_run_to_their_end_while_the_probes_answer_and_new_requests_are_refused(
    long_context: Path,
) -> None:
    with running_server(long_context, *OPTIONS) as server:
        engine = server.engine
        streams = [Stream(server, max_tokens=800) for _ in range(20)]
        for stream in streams:
            assert stream.begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code != 503:
            pass
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert "retry-after" in refused.headers
        assert server.wait_exit(30) == 0
        for stream in streams:
            stream.join()
            assert stream.events[-1] == "[DONE]"
            assert json.loads(stream.events[-2])["choices"][0]["finish_reason"] == "length"
        assert not engine.is_running()


@pytest.mark.slow
@pytest.mark.covers("L02")
def test_at_the_deadline_streams_end_with_an_error_and_the_server_with_zero(long_context: Path) -> None:
    with running_server(long_context, *OPTIONS, "--shutdown-timeout", "1") as server:
        engine = server.engine
        stream = Stream(server, NEVER_ENDS)
        assert stream.begun.wait(30)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit(10) == 0
        assert 1 <= time.monotonic() - started < 3
        stream.join()
        assert stream.events[-1] == "[DONE]"
        assert json.loads(stream.events[-2])["error"]["code"] == "shutting_down"
        assert not engine.is_running()


@pytest.mark.slow
@pytest.mark.covers("L03")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(long_context: Path, number: signal.Signals) -> None:
    with running_server(long_context, *OPTIONS) as server:
        engine = server.engine
        stream = Stream(server, NEVER_ENDS)
        assert stream.begun.wait(30)
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(number)
        assert server.wait_exit(5) == 128 + number
        assert time.monotonic() - started < 1
        psutil.wait_procs([engine], timeout=5)
        assert not engine.is_running()
        stream.join()


@pytest.mark.slow
@pytest.mark.covers("L04")
@pytest.mark.parametrize("seconds", [0.1, 0.7, 1.3, 2.0])
def test_a_signal_while_the_server_starts_ends_it_and_all_it_started(
    tiny_checkpoint: Path, seconds: float
) -> None:
    server = ServerProcess(tiny_checkpoint, *OPTIONS)
    try:
        time.sleep(seconds)
        family = psutil.Process(server.process.pid).children(recursive=True)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        # Before its first lines of Python have run, the signal has its default effect.
        assert server.wait_exit(10) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 5
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert "Traceback" not in server.log
    finally:
        server.close()


@pytest.fixture(params=["full", "closed"])
def broken_log(request: pytest.FixtureRequest) -> Iterator[int]:
    """A file descriptor that takes nothing: of a full disk, or of a pipe whose reader has left."""
    if request.param == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


@pytest.mark.slow
@pytest.mark.covers("E12")
def test_a_log_that_cannot_be_written_harms_nobody(
    tiny_checkpoint: Path, broken_log: int, free_port: int
) -> None:
    server = ServerProcess(tiny_checkpoint, *OPTIONS, port=free_port, log=broken_log)
    try:
        server.wait_ready()
        for _ in range(3):
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
            assert answer.status_code == 200
            assert httpx.get(f"{server.url}/nope").status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.covers("H12")
def test_more_connections_than_open_files_are_allowed_leave_the_server_serving(tiny_checkpoint: Path) -> None:
    server = ServerProcess(tiny_checkpoint, *OPTIONS, max_files=256)
    idle: list[socket.socket] = []
    try:
        server.wait_ready()
        process = psutil.Process(server.process.pid)
        before = process.num_fds()
        port = int(server.url.rsplit(":", 1)[1])
        body = {"prompt": "a", "max_tokens": 2}
        for number in range(1000):
            idle.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            if number % 100 == 99:
                assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert process.num_fds() < 256
        for sock in idle:
            sock.close()
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        deadline = time.monotonic() + 10
        while process.num_fds() > before + 5:
            assert time.monotonic() < deadline, f"{process.num_fds()} files are open, {before} were"
            time.sleep(0.05)
        assert "Traceback" not in server.log
    finally:
        for sock in idle:
            sock.close()
        server.close()


@pytest.mark.slow
def test_ctrl_c_which_reaches_the_engine_too_lets_streams_finish(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, *OPTIONS) as server:
        stream = Stream(server, max_tokens=300)
        assert stream.begun.wait(30)
        for process in (server.engine, server.process):
            process.send_signal(signal.SIGINT)
        assert server.wait_exit(30) == 0
        stream.join()
        assert stream.events[-1] == "[DONE]"
