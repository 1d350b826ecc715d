"""Right requests, wrong ones, junk and clients that leave, all at once."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import ServerProcess, running_server

SECONDS = 30
CLIENTS = 12
CANARY = {"prompt": "canary", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
USER = [{"role": "user", "content": "ab"}]

WRONG: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": [10**9]}),
    ("/v1/completions", {"prompt": "a" * 100_000}),
    ("/v1/completions", {"prompt": "a", "guided_regex": "(" * 5000}),
    ("/v1/completions", {"prompt": "a", "n": 10**9}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1000000": 1}}),
    ("/v1/chat/completions", {"messages": USER, "guided_json": {"type": "nothing"}}),
    ("/v1/chat/completions", {"messages": USER, "tools": [{"type": "function"}]}),
    ("/v1/messages", {"messages": USER}),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}),
    ("/tokenize", {"prompt": 5}),
]
JUNK = [
    b"\x16\x03\x01\x02",
    b"GET / HTTP/0.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n",
    b"\0" * 5000,
]


class Client:
    """Does whatever its random numbers say, until the time is over."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        host, port = self.server.url.removeprefix("http://").split(":")
        self.address = (host, int(port))
        deadline = time.monotonic() + SECONDS
        with self.server.client() as self.http:
            while time.monotonic() < deadline:
                self.random.choice((self.ask, self.stream, self.be_wrong, self.leave, self.send_junk))()
        return self.seen

    def body(self) -> dict[str, Any]:
        number = self.random.randint
        extra = self.random.choice(
            (
                {},
                {"n": 3},
                {"logprobs": 3},
                {"guided_regex": "[a-f]{1,9}"},
                {"presence_penalty": 1},
                {"stop": "e"},
            )
        )
        return {"prompt": "a b" * number(1, 80), "max_tokens": number(1, 60), "seed": number(0, 99), **extra}

    def ask(self) -> None:
        response = self.http.post("/v1/completions", json=self.body())
        assert response.status_code == 200, response.text
        self.seen["answers"] += 1

    def stream(self) -> None:
        with self.http.stream("POST", "/v1/completions", json={**self.body(), "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert not any('"error"' in line for line in lines)
        self.seen["streams"] += 1

    def be_wrong(self) -> None:
        path, body = self.random.choice(WRONG)
        response = self.http.post(path, json=body)
        # Too many grammars may wait to be checked at the moment.
        assert response.status_code in (400, 429), response.text
        self.seen["refusals"] += 1

    def leave(self) -> None:
        payload = json.dumps({**self.body(), "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
        whole = head.encode() + payload
        with socket.create_connection(self.address) as sock:
            if self.random.random() < 0.5:
                sock.sendall(whole[: self.random.randint(1, len(whole))])
            else:
                sock.sendall(whole)
                time.sleep(self.random.random() / 20)
        self.seen["departures"] += 1

    def send_junk(self) -> None:
        with socket.create_connection(self.address) as sock:
            sock.sendall(self.random.choice(JUNK))
        self.seen["junk"] += 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.covers("R33")
def test_a_storm_of_every_kind_of_client_leaves_the_server_as_it_was(tiny_checkpoint: Path) -> None:
    with running_server(tiny_checkpoint, "--dtype", "float32", "--num-threads", "1") as server:
        engine = server.engine.pid
        with server.client() as client:
            before = client.post("/v1/completions", json=CANARY).json()["choices"]
        with ThreadPoolExecutor(CLIENTS) as pool:
            seen = sum(pool.map(lambda seed: Client(server, seed).run(), range(CLIENTS)), Counter())
        print(dict(seen))
        assert min(seen[kind] for kind in ("answers", "streams", "refusals", "departures", "junk")) > 0
        assert server.engine.pid == engine
        server.wait_metric("vllm:num_requests_running", 0)
        server.wait_metric("vllm:num_requests_waiting", 0)
        server.wait_metric("vllm:kv_cache_usage_perc", 0)
        with server.client() as client:
            assert client.post("/v1/completions", json=CANARY).json()["choices"] == before
        assert " ERROR " not in server.log
