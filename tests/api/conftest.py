from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.support import LiveServer, fresh, live_server
from tests.fixtures_tokenizers import gemma3_tokenizer, gemma3_tokenizer_file

__all__ = ["gemma3_tokenizer", "gemma3_tokenizer_file"]


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[LiveServer]:
    with live_server() as live:
        yield live


@pytest.fixture
def server(_shared_server: LiveServer) -> Iterator[LiveServer]:
    """One server for all tests that need no options; whatever a test does, it must be idle again after it."""
    yield from fresh(_shared_server)
