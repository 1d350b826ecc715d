from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import server_process
from tests.e2e.server_process import ServerProcess, running_server


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Path) -> Iterator[ServerProcess]:
    with running_server(tiny_checkpoint, "--dtype", "float32", "--num-threads", "1") as server:
        yield server


@pytest.fixture
def free_port() -> int:
    return server_process.free_port()
