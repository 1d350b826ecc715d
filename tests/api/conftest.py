from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.support import ADMIN_KEY, LiveServer, fresh, live_server
from tests.fixtures_tokenizers import gemma3_tokenizer, gemma3_tokenizer_file

__all__ = ["gemma3_tokenizer", "gemma3_tokenizer_file"]


@pytest.fixture(scope="session")
def admin_key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps([{"name": "admin", "keys": [ADMIN_KEY], "admin": True}]))
    return path


@pytest.fixture
def admin_server(admin_key_file: Path) -> Iterator[LiveServer]:
    """One whose client has an admin's key."""
    with live_server(api_key_file=admin_key_file) as live:
        live.http.headers["authorization"] = f"Bearer {ADMIN_KEY}"
        yield live


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


@pytest.fixture
def server(_shared_server: LiveServer) -> Iterator[LiveServer]:
    """One server for all tests that need no options; whatever a test does, it must be idle again after it."""
    yield from fresh(_shared_server)
