"""This server in a process of its own, for one benchmark."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

RESULTS = Path(__file__).parent / "results"


@asynccontextmanager
async def serving(options: Sequence[str], start_timeout: float = 600.0) -> AsyncIterator[str]:
    """The url of this server with these options, as `running` yields it. Raises RuntimeError."""
    async with running(["server", "serve", *options], start_timeout) as (_, url):
        yield url


@asynccontextmanager
async def running(
    module: Sequence[str], start_timeout: float, variables: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and the url of a server, once it is ready; it ends on leaving.

    module: what `python -m` runs, with its options. variables: of its environment, beside this process's.
    Raises RuntimeError if it ends before it is ready, or is not ready after `start_timeout` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", *module, "--port", str(port), "--disable-access-log"]
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | (variables or {}))
    try:
        await _until_ready(url, process, start_timeout)
        yield process, url
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until_ready(url: str, process: asyncio.subprocess.Process, limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode} before it was ready")
            try:
                if (await client.get(f"{url}/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # The port is not open yet.
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {limit_seconds:g} s")
