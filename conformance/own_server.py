"""This server with its embedded model, as the suite tests it when no other is named."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.serve import serving
from conformance.suite import Target

API_KEY = "sk-conformance"
START_SECONDS = 300.0


@asynccontextmanager
async def own_server() -> AsyncIterator[Target]:
    """A server on a free port, with a key, for as long as the block lasts. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as data:
        options = ["--api-key", API_KEY, "--data-dir", data, "--log-level", "warning"]
        async with serving(options, START_SECONDS) as url:
            yield Target(url, api_key=API_KEY, started_with="gemma-server serve --data-dir DIRECTORY")
