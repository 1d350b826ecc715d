"""Servers for the SDKs: one whose engine follows a script, and the real one with the embedded model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server import embedded_model
from tests.api.support import LiveServer, live_server
from tests.e2e.server_process import ServerProcess, running_server

API_KEY = "sk-test"


@pytest.fixture(scope="module")
def scripted() -> Iterator[LiveServer]:
    with live_server(api_key=[API_KEY], max_queued_requests=2) as live:
        live.http.headers["authorization"] = f"Bearer {API_KEY}"
        yield live
        live.assert_idle()


@pytest.fixture(scope="session")
def embedded() -> Iterator[ServerProcess]:
    with running_server(embedded_model.locate(), "--api-key", API_KEY) as server:
        yield server
