"""Two tenants on the real server: what one of them does is nothing to the other."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server_process import ServerProcess, running_server

KEYS = """
- {name: one, keys: [sk-canary-one, sk-canary-old]}
- {name: two, keys: [sk-canary-two]}
"""
SECRET = "the quick brown fox jumps over the lazy dog and tells nobody of it " * 3


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(KEYS)
    return path


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, key_file: Path) -> Iterator[ServerProcess]:
    options = ("--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "2")
    with running_server(tiny_checkpoint, *options, "--api-key-file", str(key_file)) as server:
        yield server


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-canary-{name}"}


@pytest.mark.covers("S10")
def test_what_one_tenant_asked_is_cached_for_no_other(server: ServerProcess) -> None:
    def cached_tokens(key: str, **fields: Any) -> int:
        body = {"prompt": SECRET, "max_tokens": 1, **fields}
        with server.client() as client:
            answer = client.post("/v1/completions", json=body, headers=bearer(key)).json()
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    for fields in ({}, {"cache_salt": "shared"}):
        assert cached_tokens("one", **fields) == 0
        assert cached_tokens("one", **fields) > 16
        assert cached_tokens("old", **fields) > 16, "another key of the same tenant"
        assert cached_tokens("two", **fields) == 0
        assert cached_tokens("two", **fields) > 16
    assert cached_tokens("two", cache_salt="name:one/shared") == 0


@pytest.mark.covers("K16")
async def test_a_small_tenant_does_not_queue_behind_a_greedy_one(server: ServerProcess) -> None:
    ends: list[tuple[str, float]] = []

    async def one(client: httpx.AsyncClient, name: str, prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body, headers=bearer(name))
        assert response.status_code == 200
        ends.append((name, time.monotonic()))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        greedy = [asyncio.create_task(one(client, "one", f"{number} a b c")) for number in range(60)]
        while len(ends) < 4:  # noqa: ASYNC110  # nobody tells when
            await asyncio.sleep(0.005)
        num_before = len(ends)
        await one(client, "two", "d e f")
        num_after = len(ends)
        await asyncio.gather(*greedy)
    # Those that had a seat, and those that shared a seat's time with it.
    assert num_after - num_before <= 8


@pytest.mark.covers("S03")
def test_sighup_changes_the_keys_and_cuts_no_stream(server: ServerProcess, key_file: Path) -> None:
    def status(key: str) -> int:
        with server.client() as client:
            return client.get("/v1/models", headers=bearer(key)).status_code

    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json=body, headers=bearer("old")) as response,
    ):
        lines = response.iter_lines()
        received = [next(lines)]
        key_file.write_text(KEYS.replace("sk-canary-old", "sk-canary-new"))
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 10
        while status("old") == 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (status("old"), status("new"), status("two")) == (401, 200, 200)
        received += list(lines)
    assert "data: [DONE]" in received
    assert "error" not in "".join(received)
    processes = [psutil.Process(server.process.pid), server.engine]
    shown = " ".join(word for process in processes for word in process.cmdline())
    assert "sk-canary" not in shown + server.log
