"""This server with its embedded model, as the suite tests it when no other is named."""

from __future__ import annotations

import subprocess
import sys
import tempfile
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
    with tempfile.TemporaryDirectory() as data:
        process = _start(port, data)
        try:
            await wait_until_ready(url, process, START_SECONDS)
            yield Target(url, api_key=API_KEY, started_with="gemma-server serve --data-dir DIRECTORY")
        finally:
            process.terminate()
            process.wait(timeout=60)


def _start(port: int, data: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--api-key", API_KEY]
    command += ["--data-dir", data, "--disable-access-log", "--log-level", "warning"]
    return subprocess.Popen(command)
