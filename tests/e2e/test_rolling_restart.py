"""Two replicas behind a load balancer, which are restarted one after the other while clients use them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.server_process import ServerProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy (apt-get install haproxy)"),
]

NUM_STREAMS = 80
POLL_SECONDS = 0.3
"""Between two looks of the balancer at /readyz."""
OPTIONS = (
    *("--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "64"),
    *("--shutdown-delay", "3", "--shutdown-timeout", "60"),
)
# Nothing is tried again: what the client sees is what the servers did.
CONFIGURATION = """
global
    maxconn 1000
defaults
    mode http
    timeout connect 2s
    timeout client 120s
    timeout server 120s
    timeout check 10s
    retries 0
frontend clients
    bind 127.0.0.1:{front}
    default_backend replicas
backend replicas
    balance leastconn
    option http-keep-alive
    option httpchk GET /readyz
    default-server check inter {milliseconds}ms fall 1 rise 1
    server a 127.0.0.1:{first}
    server b 127.0.0.1:{second}
"""


class Clients:
    """As many as there are streams, each of which asks for the next one when it has read one."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._use, args=(number,)) for number in range(NUM_STREAMS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def _use(self, number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._over.is_set():
                max_tokens = chance.randint(20, 200)
                outcome = _stream(client, max_tokens) if number % 10 else _whole(client)
                with self._lock:
                    self.outcomes[outcome] += 1


def _stream(client: httpx.Client, max_tokens: int) -> str:
    body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    except httpx.HTTPError as error:
        return f"a stream broke: {error!r}"
    if response.status_code != 200:
        return _refusal("a stream", response)
    if events[-1] != "[DONE]" or json.loads(events[-2])["choices"][0]["finish_reason"] != "length":
        return f"a stream ended with {events[-2:]}"
    return "complete"


def _whole(client: httpx.Client) -> str:
    try:
        response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 10, "ignore_eos": True})
    except httpx.HTTPError as error:
        return f"an answer did not come: {error!r}"
    return "complete" if response.status_code == 200 else _refusal("an answer", response)


def _refusal(what: str, response: httpx.Response) -> str:
    # The balancer's own answers are HTML.
    is_ours = response.headers.get("content-type") == "application/json"
    return f"{what} was refused with {response.status_code} by {'a server' if is_ours else 'the balancer'}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@contextmanager
def _balancer(directory: Path, front: int, first: int, second: int) -> Iterator[None]:
    configuration = directory / "haproxy.cfg"
    milliseconds = int(POLL_SECONDS * 1000)
    configuration.write_text(
        CONFIGURATION.format(front=front, first=first, second=second, milliseconds=milliseconds)
    )
    with subprocess.Popen(["haproxy", "-db", "-f", str(configuration)], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.mark.covers("L07")
def test_a_rolling_restart_behind_a_balancer_breaks_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    front, *ports = _free_ports(3)
    replicas = [ServerProcess(tiny_checkpoint, *OPTIONS, port=port) for port in ports]
    try:
        for replica in replicas:
            replica.wait_ready()
        with _balancer(tmp_path, front, *ports):
            time.sleep(2 * POLL_SECONDS)
            with Clients(f"http://127.0.0.1:{front}") as clients:
                for number, port in enumerate(ports):
                    time.sleep(3)
                    old = replicas[number]
                    num_running = old.metric("vllm:num_requests_running")
                    assert num_running > 0
                    old.process.send_signal(signal.SIGTERM)
                    started = time.monotonic()
                    assert old.wait_exit(90) == 0, old.log
                    seconds = time.monotonic() - started
                    print(f"\nreplica {number}: {num_running:.0f} running, ended in {seconds:.1f} s")
                    old.close()
                    replicas[number] = ServerProcess(tiny_checkpoint, *OPTIONS, port=port)
                    replicas[number].wait_ready()
                    time.sleep(2)
                assert replicas[0].metric("vllm:request_success_total") > 0
        print(dict(clients.outcomes))
        assert set(clients.outcomes) == {"complete"}
        assert clients.outcomes["complete"] > NUM_STREAMS
    finally:
        for replica in replicas:
            replica.close()
