"""`deploy/vertex`: what the scripts ask of Google's SDK, and what they say of a server."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from deploy.vertex import smoke
from tests.api.support import LiveServer, live_server

ENDPOINT = "projects/p/locations/l/endpoints/7"
NEEDED = ["--project", "p", "--region", "l", "--image", "i", "--name", "n", "--model", "m"]


class FakeEndpoint:
    """An endpoint whose container is `server`."""

    resource_name = ENDPOINT

    def __init__(self, server: LiveServer | None = None) -> None:
        self._server = server
        self.gca_resource = SimpleNamespace(dedicated_endpoint_enabled=True)

    def raw_predict(
        self, body: bytes, headers: dict[str, str], *, use_dedicated_endpoint: bool = False
    ) -> httpx.Response:
        return self._post("/predict", body, headers)

    def stream_raw_predict(
        self, body: bytes, headers: dict[str, str], *, use_dedicated_endpoint: bool = False
    ) -> Iterator[bytes]:
        return iter(self._post("/predict", body, headers).content.split(b"\n"))

    def invoke(self, request_path: str, body: bytes, headers: dict[str, str], stream: bool = False) -> Any:
        answer = self._post(request_path, body, headers)
        return iter(answer.content.split(b"\n")) if stream else answer

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        assert self._server is not None
        return self._server.http.post(path, content=body, headers=headers)


class FakeSdk(ModuleType):
    """What the scripts use of google-cloud-aiplatform, with the names that its version 2.7.0 has."""

    def __init__(self) -> None:
        super().__init__("google.cloud.aiplatform")
        self.uploaded: dict[str, Any] = {}
        self.created: dict[str, Any] = {}
        self.server: LiveServer | None = None
        self.error: Exception | None = None
        self.Model = SimpleNamespace(upload=self._upload)
        self.Endpoint = _EndpointClass(self)

    def init(self, *, project: str, location: str) -> None:
        pass

    def _upload(
        self,
        serving_container_image_uri: str | None = None,
        *,
        display_name: str | None = None,
        artifact_uri: str | None = None,
        serving_container_predict_route: str | None = None,
        serving_container_health_route: str | None = None,
        serving_container_invoke_route_prefix: str | None = None,
        serving_container_environment_variables: dict[str, str] | None = None,
        serving_container_ports: list[int] | None = None,
        serving_container_deployment_timeout: int | None = None,
        serving_container_shared_memory_size_mb: int | None = None,
        serving_container_startup_probe_exec: list[str] | None = None,
        serving_container_startup_probe_period_seconds: int | None = None,
        serving_container_startup_probe_timeout_seconds: int | None = None,
        serving_container_health_probe_exec: list[str] | None = None,
        serving_container_health_probe_period_seconds: int | None = None,
        serving_container_health_probe_timeout_seconds: int | None = None,
    ) -> Any:
        given = {name: value for name, value in locals().items() if name != "self" and value is not None}
        self.uploaded = {name.removeprefix("serving_container_"): value for name, value in given.items()}
        return SimpleNamespace(deploy=lambda **given: None)


class _EndpointClass:
    def __init__(self, sdk: FakeSdk) -> None:
        self._sdk = sdk

    def __call__(self, endpoint_name: str) -> FakeEndpoint:
        if self._sdk.error is not None:
            raise self._sdk.error
        return FakeEndpoint(self._sdk.server)

    def create(
        self, *, display_name: str, dedicated_endpoint_enabled: bool, inference_timeout: int | None = None
    ) -> FakeEndpoint:
        self._sdk.created = {"dedicated": dedicated_endpoint_enabled, "timeout": inference_timeout}
        return FakeEndpoint()


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> FakeSdk:
    fake = FakeSdk()
    for name in ("google", "google.cloud"):
        package: Any = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "google.cloud.aiplatform", fake)
    monkeypatch.delitem(sys.modules, "deploy.vertex.deploy", raising=False)
    return fake


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(predict_route="/predict") as live:
        yield live


# --- deploy.py -------------------------------------------------------------------------------------------


def deploy(*arguments: str) -> None:
    script = importlib.import_module("deploy.vertex.deploy")
    script.deploy(script.parse_arguments([*NEEDED, *arguments]))


def test_a_model_gets_a_route_for_predictions_and_the_platforms_own_probes(sdk: FakeSdk) -> None:
    deploy()
    assert sdk.uploaded["predict_route"] == "/predict"
    assert sdk.uploaded["health_route"] == "/readyz"
    assert not {name for name in sdk.uploaded if "probe" in name or "memory" in name or "invoke" in name}
    assert sdk.created == {"dedicated": True, "timeout": 3600}


def test_with_invoke_all_paths_take_the_place_of_the_one_for_predictions(sdk: FakeSdk) -> None:
    deploy("--invoke")
    assert sdk.uploaded["invoke_route_prefix"] == "/*"
    assert "predict_route" not in sdk.uploaded


def test_shared_memory_and_probes_are_as_asked_for(sdk: FakeSdk) -> None:
    deploy(
        *("--shared-memory-mb", "2048", "--startup-probe-period", "240"),
        *("--health-probe-period", "15", "--health-probe-timeout", "5"),
    )
    assert sdk.uploaded["shared_memory_size_mb"] == 2048
    probes = {name: value for name, value in sdk.uploaded.items() if "probe" in name}
    assert probes == {
        "startup_probe_exec": ["python", "-m", "server.probe", "startup"],
        "startup_probe_period_seconds": 240,
        "startup_probe_timeout_seconds": 240,
        "health_probe_exec": ["python", "-m", "server.probe", "ready"],
        "health_probe_period_seconds": 15,
        "health_probe_timeout_seconds": 5,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--invoke", "--shared-endpoint"], "--shared-endpoint"),
        (["--shared-memory-mb", "0"], "--shared-memory-mb"),
        (["--health-probe-timeout", "5"], "--health-probe-period"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_uploaded(
    sdk: FakeSdk, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        deploy(*arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not sdk.uploaded


# --- smoke.py --------------------------------------------------------------------------------------------


def test_a_server_in_order_passes(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(list(smoke.checks()))
    assert all(line.startswith("ok ") for line in lines)


@pytest.mark.parametrize("invoke", [[], ["--invoke"]])
def test_an_endpoint_in_order_passes(
    server: LiveServer, sdk: FakeSdk, capsys: pytest.CaptureFixture[str], invoke: list[str]
) -> None:
    sdk.server = server
    assert smoke.main(["--endpoint", ENDPOINT, *invoke]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (4 if invoke else len(list(smoke.checks())))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8080", "http://no.such.host.invalid"])
def test_a_server_that_does_not_answer_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert smoke.main(["--url", url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"no answer from {url}: ")


def test_an_endpoint_that_is_not_there_is_said_in_one_line(
    sdk: FakeSdk, capsys: pytest.CaptureFixture[str]
) -> None:
    sdk.error = RuntimeError("404 The Endpoint\ndoes not exist.")
    assert smoke.main(["--endpoint", ENDPOINT]) == 1
    assert capsys.readouterr().err == f"no answer from {ENDPOINT}: 404 The Endpoint does not exist.\n"


def test_a_server_that_is_not_healthy_fails_though_it_predicts(
    server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke.main(["--url", server.url, "--health-route", "/nope"]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "FAILED  /nope: 404"
    assert all(line.startswith("ok ") for line in others)


def test_a_key_opens_a_server_that_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with live_server(predict_route="/predict", api_key=["k", "l"]) as server:
        assert smoke.main(["--url", server.url]) == 1
        assert "401" in capsys.readouterr().out
        assert smoke.main(["--url", server.url, "--api-key", "l"]) == 0
        monkeypatch.setenv("GEMMA_SERVER_API_KEY", "k,l")
        assert smoke.main(["--url", server.url]) == 0


@pytest.mark.parametrize(
    "arguments",
    [["--endpoint", ENDPOINT, "--api-key", "k"], ["--url", "http://a", "--invoke"], ["--endpoint", "7"]],
)
def test_arguments_that_mean_nothing_there_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        smoke.main(arguments)
