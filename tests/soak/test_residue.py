"""What one client wrote never shows in what another one gets, however long they share a server."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import running_server

NUM_REQUESTS = 10_000
PROMPTS = 200
"""Different ones of the second client; each is asked many times."""


def secret(number: int) -> dict[str, Any]:
    generator = random.Random(number)
    word = f"zebra{number:05}"
    text = f"my secret is {word} " * generator.randint(1, 6)
    return {"prompt": text, "max_tokens": generator.randint(1, 30), "seed": number}


def question(number: int) -> dict[str, Any]:
    generator = random.Random(-number)
    text = "".join(generator.choice("abcdefgh ") for _ in range(generator.randint(5, 150)))
    return {"prompt": text, "max_tokens": 20, "temperature": 0, "ignore_eos": True}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.covers("S11")
def test_no_secret_of_ten_thousand_requests_shows_in_another_s_output(tiny_checkpoint: Path) -> None:
    options = ("--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "60")
    with (
        running_server(tiny_checkpoint, *options, "--api-key", "first-key", "second-key") as server,
        server.client(headers={"authorization": "Bearer first-key"}) as first,
        server.client(headers={"authorization": "Bearer second-key"}) as second,
    ):

        def ask(client: httpx.Client, body: dict[str, Any]) -> str:
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            text: str = response.json()["choices"][0]["text"]
            return text

        alone = [ask(second, question(number)) for number in range(PROMPTS)]

        def mixed(number: int) -> None:
            if number % 2:
                ask(first, secret(number))
                return
            which = number // 2 % PROMPTS
            text = ask(second, question(which))
            assert text == alone[which]
            assert "zebra" not in text

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(mixed, range(NUM_REQUESTS)))
        server.wait_metric("vllm:kv_cache_usage_perc", 0)
