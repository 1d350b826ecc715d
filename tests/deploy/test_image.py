"""The image of deploy/Dockerfile, built and run as an orchestrator would, without one (`make image-check`)."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import embedded_model
from tests.deploy.container import Container, image_configuration
from tests.e2e.server_process import free_port, running_server
from tools import build_image

OBSTACLE = build_image.obstacle()
MAX_BYTES = 1.4e9
"""Of the CPU image, unpacked."""
QUESTION = {"prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(OBSTACLE is not None, reason=f"building an image {OBSTACLE}"),
]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    build_image.build()
    with build_image.mounted() as root:
        yield root


@pytest.fixture(scope="module")
def configuration(root: Path) -> dict[str, Any]:
    return image_configuration(build_image.IMAGE)


def environment(**more: str) -> dict[str, str]:
    return {
        "GEMMA_SERVER_PORT": str(free_port()),
        "GEMMA_SERVER_ALLOW_UNAUTHENTICATED": "true",
        **more,
    }


def ask(url: str) -> str:
    response = httpx.post(f"{url}/v1/completions", json=QUESTION, timeout=60)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


@pytest.mark.covers("L08", "S20")
def test_it_serves_from_a_read_only_root_without_rights_and_ends_with_its_last_answer(
    root: Path, configuration: dict[str, Any], tmp_path: Path
) -> None:
    with running_server(embedded_model.locate()) as outside:
        expected = ask(outside.url)
    marker = tmp_path / "marker"
    marker.touch()
    container = Container(root, configuration, tmp_path, environment())
    with closing(container):
        print(f"\nready after {container.wait_ready():.1f} s, the first time")
        assert ask(container.url) == expected
        first = container.first_process
        status = Path(f"/proc/{first.pid}/status").read_text()
        for line in ("Uid:\t10001\t10001", "Gid:\t10001\t10001", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"):
            assert line in status
        assert "CapBnd:\t0000000000000000" in status
        (namespaced,) = [line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")]
        assert namespaced[-1] == "1"
        processes = [first, *first.children(recursive=True)]
        print(
            f"RSS {sum(process.memory_info().rss for process in processes) / 2**20:.0f} MiB in {len(processes)}"
        )

        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
        events = []
        ended = 0.0
        with httpx.stream("POST", f"{container.url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                    if len(events) == 5:
                        ended = time.monotonic()
                        first.send_signal(signal.SIGTERM)
        assert container.wait_exit() == 0, container.log
        print(f"ended {time.monotonic() - ended:.1f} s after SIGTERM")
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert not any(process.is_running() for process in processes)
    written = subprocess.run(
        ["find", root, "-xdev", "-newer", marker, "-type", "f"], check=True, capture_output=True, text=True
    )
    assert written.stdout == ""

    again = Container(root, configuration, tmp_path, environment())
    with closing(again):
        print(f"ready after {again.wait_ready():.1f} s, with what the first start left in /cache")


def test_any_user_can_run_it(root: Path, configuration: dict[str, Any], tmp_path: Path) -> None:
    model = {"GEMMA_SERVER_SERVED_MODEL_NAME": "mine", "GEMMA_SERVER_API_KEY": "sk-test"}
    container = Container(root, configuration, tmp_path, environment(**model), uid=123456)
    with closing(container):
        container.wait_ready()
        models = f"{container.url}/v1/models"
        assert httpx.get(models).status_code == 401
        answer = httpx.get(models, headers={"authorization": "Bearer sk-test"}).json()
        assert [each["id"] for each in answer["data"]] == ["mine"]


def test_without_a_key_it_does_not_start_and_says_what_to_do(
    root: Path, configuration: dict[str, Any], tmp_path: Path
) -> None:
    container = Container(root, configuration, tmp_path, {})
    with closing(container):
        assert container.wait_exit() == 78
        for variable in ("GEMMA_SERVER_API_KEY", "GEMMA_SERVER_ALLOW_UNAUTHENTICATED"):
            assert variable in container.log


def test_it_can_write_to_its_temporary_places_alone(
    root: Path, configuration: dict[str, Any], tmp_path: Path
) -> None:
    writable = "for d in / /opt/venv /etc /models /var/tmp /tmp /cache; do if [ -w $d ]; then echo $d; fi; done"
    script = f"grep -q '^[^ ]* / [^ ]* ro' /proc/mounts && {writable}"
    container = Container(root, configuration, tmp_path, {}, command=["/bin/sh", "-c", script])
    with closing(container):
        assert container.wait_exit() == 0
        assert container.log.split() == ["/tmp", "/cache"]


def test_neither_compiler_nor_pip_is_in_it_and_what_is_has_been_compiled(root: Path) -> None:
    unwanted = [*root.glob("usr/bin/*g++*"), *root.glob("usr/bin/gcc*"), *root.glob("opt/venv/bin/pip*")]
    assert unwanted == []
    packages = next(root.glob("opt/venv/lib/python3*/site-packages"))
    assert list(packages.glob("server/engine/csrc/gemma_native-*.so"))
    assert list(packages.glob("server/__pycache__/__main__.*.pyc"))
    assert list(packages.glob("fastapi/__pycache__/*.pyc"))


def test_it_is_no_larger_than_it_has_to_be(root: Path) -> None:
    parts = build_image.sizes(root)
    print("", *(f"{size / 1e6:8.0f} MB  {part}" for part, size in parts.items()), sep="\n")
    assert sum(parts.values()) < MAX_BYTES


def test_its_configuration_is_what_orchestrators_rely_on(configuration: dict[str, Any]) -> None:
    assert configuration["Entrypoint"] == ["gemma-server"]
    assert configuration["Cmd"] == ["serve"]
    assert configuration["User"] == "10001:10001"
    assert configuration["StopSignal"] in ("SIGTERM", "15")
    assert not any("PIP_" in variable for variable in configuration["Env"])
