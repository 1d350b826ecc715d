from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.engine.device import has_gpu_driver

if not has_gpu_driver():
    # Triton reads it when it is first imported, which other tests may do before those of its kernels.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_checkpoint import write_tiny_checkpoint  # torch and transformers take seconds to import

    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
