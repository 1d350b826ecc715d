from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import LiveServer, Script, live_server


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


@pytest.fixture
def server(_shared_server: LiveServer) -> Iterator[LiveServer]:
    """One server for all tests that need no options; whatever a test does, it must be idle again after it."""
    engine = _shared_server.engine
    engine.script = Script()
    engine.submitted.clear()
    engine.aborted.clear()
    yield _shared_server
    _shared_server.assert_idle()
