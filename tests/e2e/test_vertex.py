"""A server that knows nothing but Vertex AI's variables."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from deploy.vertex import smoke


def test_the_platforms_variables_are_enough(
    tiny_checkpoint: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": str(free_port),
        "AIP_HEALTH_ROUTE": "/health/of/vertex",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_STORAGE_URI": str(tiny_checkpoint),
        "GEMMA_SERVER_DTYPE": "float32",
        "GEMMA_SERVER_WEIGHT_CACHE": "false",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "server", "serve"], env=os.environ | variables, stderr=subprocess.PIPE
    )
    try:
        url = f"http://127.0.0.1:{free_port}"
        statuses: list[int] = []
        deadline = time.monotonic() + 60
        while statuses[-1:] != [200]:
            assert time.monotonic() < deadline
            assert server.poll() is None
            try:
                statuses.append(httpx.get(f"{url}/health/of/vertex").status_code)
            except httpx.ConnectError:
                assert not statuses, "the port was closed again"
            time.sleep(0.02)
        assert set(statuses) <= {503, 200}
        assert smoke.main(["--url", url, "--health-route", "/health/of/vertex"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 10
        assert all(line.startswith("ok") for line in printed)
        body = {"prompt": "a", "max_tokens": 6, "temperature": 0}
        own = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
        predicted = httpx.post(f"{url}/predict", json={"instances": [body]}).json()["predictions"]
        assert predicted == [own]
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0
