"""Clients that ask without a pause, and keep account of how each answer ended."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter

import httpx

LONGEST_ANSWER_SECONDS = 60.0
"""A client that has waited for so long hangs."""


class Load:
    """`concurrency` clients in threads, half of which stream. Every answer is checked and counted."""

    def __init__(self, url: str, concurrency: int) -> None:
        self._url = url
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(concurrency)]
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.ends: Counter[str] = Counter()
        self.faults: list[str] = []
        """Answers that a client cannot live with."""

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * LONGEST_ANSWER_SECONDS)
            if thread.is_alive():
                self.faults.append("a client hangs")

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=LONGEST_ANSWER_SECONDS) as client:
            while not self._stopped.is_set():
                body = {
                    "prompt": "".join(chance.choice("abcdef ") for _ in range(chance.randrange(1, 200))),
                    "max_tokens": chance.randrange(1, 150),
                    "ignore_eos": True,
                }
                try:
                    end = _streamed(client, body) if seed % 2 else _whole(client, body)
                except (httpx.HTTPError, ValueError, AssertionError) as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                    end = "fault"
                with self._lock:
                    self.ends[end] += 1
                if end == "503 engine_unavailable":
                    time.sleep(1.0)  # sooner than it was told to come back


def _whole(client: httpx.Client, body: dict[str, object]) -> str:
    response = client.post("/v1/completions", json=body)
    if response.status_code == 200:
        assert response.json()["choices"][0]["finish_reason"] == "length", response.text
        assert response.json()["usage"]["completion_tokens"] == body["max_tokens"], response.text
        return "complete"
    return _refusal(response)


def _streamed(client: httpx.Client, body: dict[str, object]) -> str:
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        text = response.read().decode()
    if response.status_code != 200:
        return _refusal(response)
    payloads = [block.removeprefix("data: ") for block in text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(payload) for payload in payloads[:-1] if not payload.startswith(":")]
    assert payloads[-1] == "[DONE]", text[-500:]
    assert "[DONE]" not in payloads[:-1], text
    if "error" in events[-1]:
        return f"stream, {events[-1]['error']['code']}"
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons[-1] == "length", text[-500:]
    assert not any(reasons[:-1]), text
    return "complete stream"


def _refusal(response: httpx.Response) -> str:
    error = response.json()["error"]
    if response.status_code == 503:
        assert int(response.headers["retry-after"]) > 0
    return f"{response.status_code} {error['code']}"
