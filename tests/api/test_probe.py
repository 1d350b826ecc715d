"""The probe that runs as a command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server import probe
from tests.api.support import LiveServer


@pytest.mark.parametrize(("what", "draining"), [([], 1), (["ready"], 1), (["live"], 0), (["startup"], 0)])
@pytest.mark.parametrize("variable", ["GEMMA_SERVER_PORT", "AIP_HTTP_PORT"])
def test_its_exit_code_is_the_probes_answer(
    server: LiveServer, capsys: pytest.CaptureFixture[str], what: list[str], draining: int, variable: str
) -> None:
    environment = {variable: str(server.port)}
    assert probe.main(what, environment) == 0
    server.runtime.is_draining = True
    try:
        assert probe.main(what, environment) == draining
    finally:
        server.runtime.is_draining = False
    assert "draining" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "port"), [({}, 8000), ({"AIP_MODE": "PREDICTION"}, 8080), ({"AIP_HTTP_PORT": "1"}, 1)]
)
def test_it_asks_where_the_server_listens_by_default(
    capsys: pytest.CaptureFixture[str], environment: dict[str, str], port: int
) -> None:
    assert probe.main([], environment) == 1
    assert f"at port {port}:" in capsys.readouterr().out


@pytest.mark.parametrize("port", ["1", "none"])
def test_no_server_is_a_failure(capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert probe.main([], {"GEMMA_SERVER_PORT": port}) == 1
    assert "no answer" in capsys.readouterr().out


def test_another_word_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["dead"], {}) == 2
    assert "usage" in capsys.readouterr().err


def test_it_imports_nothing_of_the_server() -> None:
    script = (
        "import sys, server.probe; print(*(name for name in sys.modules if name.startswith(('server', 'py'))))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert set(printed.split()) - {"pyexpat"} <= {"server", "server.probe"}
