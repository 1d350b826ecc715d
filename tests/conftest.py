from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_checkpoint import write_tiny_checkpoint  # torch and transformers take seconds to import

    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
