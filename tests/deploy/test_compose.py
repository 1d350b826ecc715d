"""deploy/compose.yaml, as far as it can be checked without an engine: that what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import variable_name
from server.options import ServerConfig

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ("server", "server-gpu")
GRAFANA = DEPLOY / "observability" / "grafana"

every_service = pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))


@every_service
def test_what_is_mounted_exists(service: dict[str, Any]) -> None:
    for source, *_ in (mount.split(":") for mount in service.get("volumes", [])):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]


@every_service
def test_nothing_runs_with_rights_or_is_reached_from_elsewhere(service: dict[str, Any]) -> None:
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_images_from_registries_have_a_version(name: str) -> None:
    assert re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_variables_are_options_and_their_values_fit(name: str) -> None:
    variables = SERVICES[name]["environment"]
    ours = {variable for variable in variables if variable.startswith("GEMMA_SERVER_")}
    fields = {variable_name(field): field for field in ServerConfig.model_fields}
    assert ours <= set(fields)
    config = ServerConfig(**{fields[variable]: variables[variable] for variable in ours})
    seconds = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert seconds > config.shutdown_delay + config.shutdown_timeout


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_built_from_the_dockerfile(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    build_arguments = set(re.findall(r"^ARG (\w+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.M))
    assert set(build.get("args", {})) <= build_arguments


def test_only_one_server_runs_in_a_profile_and_prometheus_finds_it() -> None:
    assert [SERVICES[name]["profiles"] for name in SERVERS] == [["cpu"], ["gpu"]]
    assert SERVICES["server-gpu"]["networks"]["default"]["aliases"] == ["server"]


def test_grafana_looks_for_dashboards_and_data_where_compose_puts_them() -> None:
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/gemma.yml").read_text(encoding="utf-8"))
    (path,) = [each["options"]["path"] for each in provider["providers"]]
    assert mounts["./observability/grafana/dashboards"] == path
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert [each["url"] for each in source["datasources"]] == ["http://prometheus:9090"]
