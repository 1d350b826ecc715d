from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.api.support import LiveServer, live_server


@pytest.fixture(scope="session", autouse=True)
def _kubectl() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, and its kustomize builds the manifests")


@pytest.fixture(scope="session")
def running() -> Iterator[LiveServer]:
    """A server that asks for a key, and has answered one request."""
    with live_server(api_key=["secret"]) as live:
        live.http.headers["authorization"] = "Bearer secret"
        assert live.chat().status_code == 200
        del live.http.headers["authorization"]
        yield live
