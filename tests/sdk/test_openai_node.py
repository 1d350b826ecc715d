"""The official Node SDK, by way of `tests/sdk/node/suite.mjs`. It comes from npm into .cache/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.server_process import ServerProcess
from tests.sdk.conftest import API_KEY

pytestmark = pytest.mark.slow

VERSION = "6.49.0"
"""The newest that runs on Node 20."""
SUITE = Path(__file__).parent / "node" / "suite.mjs"
CACHE = Path(__file__).parents[2] / ".cache" / "node"


@pytest.fixture(scope="module")
def results(embedded: ServerProcess) -> dict[str, str]:
    """What each test of the suite ended with."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    if not (CACHE / "node_modules" / "openai").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--prefix", str(CACHE), f"openai@{VERSION}"]
        installed = subprocess.run(command, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm has no openai {VERSION}: {installed.stderr.strip()[-200:]}")
    # Modules are looked for beside the script.
    script = shutil.copy(SUITE, CACHE)
    environment = os.environ | {"BASE_URL": f"{embedded.url}/v1", "API_KEY": API_KEY}
    ran = subprocess.run(["node", script], capture_output=True, text=True, env=environment, timeout=100)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "chat",
        "stream",
        "streamHelper",
        "abort",
        "completion",
        "logprobs",
        "models",
        "rawResponse",
        "errors",
        "timeout",
    ],
)
def test_the_node_sdk_works(results: dict[str, str], name: str) -> None:
    assert results[name] == "ok"
