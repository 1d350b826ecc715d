"""This server with its embedded model, as the suite tests it when no other is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.run import free_port, wait_until_ready
from conformance.suite import Target

API_KEY = "sk-conformance"
START_SECONDS = 300.0


@asynccontextmanager
async def own_server() -> AsyncIterator[Target]:
    """A server on a free port, with a key, for as long as the block lasts. Raises RuntimeError."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = _start(port)
    try:
        await wait_until_ready(url, process, START_SECONDS)
        yield Target(url, api_key=API_KEY, started_with="gemma-server serve")
    finally:
        process.terminate()
        process.wait(timeout=60)


def _start(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--api-key", API_KEY]
    return subprocess.Popen([*command, "--disable-access-log", "--log-level", "warning"])
