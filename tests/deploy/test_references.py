"""Every name, label and port that one object says of another is true, and so is what the README says of all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.api.auth import ADMIN_PREFIX, OPEN_PATHS
from tests.api.support import LiveServer
from tests.deploy.objects import ALL, DEPLOYED, environment, matches, of_kind, pods, quantity, server_pod, the
from tests.deploy.test_workloads import each
from tools import gen_rules
from tools.manifests import (
    IN_OVERLAYS,
    K8S,
    MULTI_HOST,
    ON_ANY,
    ON_SINGLE_HOST,
    SINGLE_HOST,
    Combination,
    Manifest,
    build,
)

NAMESPACE = "gemma"
SCRAPERS = {"PodMonitoring": {"gmp-system", "gke-gmp-system"}, "ServiceMonitor": {"monitoring"}}
"""Namespaces that these have scrape."""
HEALTH_CHECKS = {"130.211.0.0/22", "35.191.0.0/16"}
"""Where Google's load balancers ask from."""
README = (K8S / "README.md").read_text(encoding="utf-8")


def selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    """The labels by which an object selects pods; of a NetworkPolicy all, also those of its peers' pods."""
    if manifest["kind"] == "Service":
        yield manifest["spec"]["selector"]
    elif manifest["kind"] != "ServiceMonitor":
        yield from _match_labels(manifest["spec"])


def _match_labels(value: Any) -> Iterator[dict[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "matchLabels":
                yield inner
            elif key != "namespaceSelector":
                yield from _match_labels(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _match_labels(inner)


def policies_of(combination: Combination, labels: dict[str, str]) -> list[Manifest]:
    found = of_kind(combination, "NetworkPolicy")
    return [each for each in found if matches(each["spec"]["podSelector"]["matchLabels"], labels)]


@each(ALL)
def test_every_selector_selects_pods(combination: Combination) -> None:
    labels = [pod.labels for pod in pods(combination)]
    for manifest in build(combination):
        if "spec" not in manifest or manifest["kind"] == "PersistentVolume":
            continue
        for selector in selectors(manifest):
            assert any(matches(selector, found) for found in labels), (manifest["kind"], selector)


@each(ALL)
def test_requests_budgets_and_scrapes_meet_the_pods_that_serve_and_no_others(
    combination: Combination,
) -> None:
    kinds = ("Service", "PodDisruptionBudget", "PodMonitoring", "InferencePool")
    found = of_kind(combination, *kinds)
    assert len(found) >= 2
    for manifest in found:
        (selector,) = selectors(manifest)
        for pod in pods(combination):
            assert matches(selector, pod.labels) == pod.serves, manifest["kind"]
    deployed = of_kind(combination, "Deployment")
    assert all(
        matches(each["spec"]["selector"]["matchLabels"], server_pod(combination).labels) for each in deployed
    )


@each(ALL)
def test_ports_are_those_of_the_container(combination: Combination) -> None:
    ports = server_pod(combination).ports
    service = the(combination, "Service")
    by_name = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    assert {name: ports[target] for name, target in by_name.items()} == ports
    for policy in of_kind(combination, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            assert {port["port"] for port in rule.get("ports", ())} <= ports.keys()
    for monitor in of_kind(combination, "PodMonitoring", "ServiceMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports.keys()
    for monitor in of_kind(combination, "ServiceMonitor"):
        assert matches(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
    for pool in of_kind(combination, "InferencePool"):
        assert [port["number"] for port in pool["spec"]["targetPorts"]] == [ports["http"]]
    for policy in of_kind(combination, "HealthCheckPolicy"):
        assert policy["spec"]["default"]["config"]["httpHealthCheck"]["port"] == ports["http"]


@each(ALL)
def test_what_pods_refer_to_is_there_or_in_the_readme(combination: Combination) -> None:
    names = {(found["kind"], found["metadata"]["name"]) for found in build(combination)}
    for pod in pods(combination):
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in names
        for source in pod.container.get("envFrom", ()):
            assert ("ConfigMap", source["configMapRef"]["name"]) in names
        for volume in pod.volumes.values():
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "secret" in volume:
                assert f"secret generic {volume['secret']['secretName']} " in README
        for variable in pod.container.get("env", ()):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                assert f"secret generic {variable['valueFrom']['secretKeyRef']['name']} " in README
    for claim in of_kind(combination, "PersistentVolumeClaim"):
        volume = the(combination, "PersistentVolume")
        assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
        assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"]
        requested = claim["spec"]["resources"]["requests"]["storage"]
        assert quantity(requested) <= quantity(volume["spec"]["capacity"]["storage"])


@each(ALL)
def test_gateway_objects_name_one_another(combination: Combination) -> None:
    names = {(found["kind"], found["metadata"]["name"]) for found in build(combination)}
    for route in of_kind(combination, "HTTPRoute"):
        refs = [*route["spec"]["parentRefs"]]
        refs += [ref for rule in route["spec"]["rules"] for ref in rule["backendRefs"]]
        assert {(ref["kind"], ref["name"]) for ref in refs} <= names
    for found in of_kind(combination, "HealthCheckPolicy", "GCPBackendPolicy"):
        ref = found["spec"]["targetRef"]
        assert (ref["kind"], ref["name"]) in names
    for found in of_kind(combination, "InferenceObjective"):
        assert ("InferencePool", found["spec"]["poolRef"]["name"]) in names


def test_the_gateway_lets_the_api_through_and_nothing_of_the_inside(running: LiveServer) -> None:
    route = the(Combination("gemma-2b-l4", ("inference-gateway",)), "HTTPRoute")
    prefixes = [match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]]
    offered = running.app.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= offered.keys()
    outside = {path for path in offered if any(path.startswith(f"{prefix}/") for prefix in prefixes)}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models"} <= outside
    assert not outside & OPEN_PATHS
    assert not any(path.startswith(ADMIN_PREFIX) for path in outside)


def test_the_pickers_chart_is_told_what_the_pool_says() -> None:
    """The chart makes the pool, too; whichever is applied last must not change it."""
    path = K8S / "components" / "inference-gateway" / "epp-values.yaml"
    router = yaml.safe_load(path.read_text(encoding="utf-8"))["router"]
    pool = the(Combination("gemma-2b-l4", ("inference-gateway",)), "InferencePool")
    spec = pool["spec"]
    assert spec["selector"]["matchLabels"] == router["modelServers"]["matchLabels"]
    assert spec["targetPorts"] == router["modelServers"]["targetPorts"]
    assert spec["appProtocol"] == router["modelServers"]["protocol"]
    picker = spec["endpointPickerRef"]
    # As the chart names its Service, after the release.
    assert picker["name"] == f"{pool['metadata']['name']}-epp"
    assert picker["port"]["number"] == router["epp"]["extProcPort"]
    assert picker["failureMode"] == router["inferencePool"]["failureMode"]
    assert f"helm upgrade --install {pool['metadata']['name']} " in README


@each(ALL)
def test_every_pod_is_behind_a_policy_and_reaches_dns(combination: Combination) -> None:
    for pod in pods(combination):
        policies = policies_of(combination, dict(pod.labels))
        kinds = {kind for policy in policies for kind in policy["spec"]["policyTypes"]}
        assert kinds == {"Ingress", "Egress"}
        open_ports = {
            port["port"]
            for policy in policies
            for rule in policy["spec"].get("egress", ())
            for port in rule.get("ports", ())
        }
        assert {53, 443} <= open_ports
        everywhere = [
            rule for policy in policies for rule in policy["spec"].get("ingress", ()) if not rule.get("from")
        ]
        assert everywhere == [], "anybody may come in"


@each(ALL)
def test_who_scrapes_and_who_checks_may_come_in(combination: Combination) -> None:
    rules = [
        source
        for policy in policies_of(combination, dict(server_pod(combination).labels))
        for rule in policy["spec"].get("ingress", ())
        for source in rule["from"]
    ]
    namespaces = {
        name
        for source in rules
        for expression in source.get("namespaceSelector", {}).get("matchExpressions", ())
        for name in expression["values"]
    }
    expected: set[str] = set()
    for kind, wanted in SCRAPERS.items():
        expected |= wanted if of_kind(combination, kind) else set()
    assert namespaces == expected
    blocks = {source["ipBlock"]["cidr"] for source in rules if "ipBlock" in source}
    assert (blocks >= HEALTH_CHECKS) == bool(of_kind(combination, "Gateway"))


@each(ALL)
def test_either_the_deployment_or_an_autoscaler_says_how_many(combination: Combination) -> None:
    scalers = of_kind(combination, "HorizontalPodAutoscaler", "ScaledObject")
    workload = server_pod(combination).workload
    if not scalers:
        least = workload["spec"]["replicas"]
    else:
        (scaler,) = scalers
        spec = scaler["spec"]
        target = spec["scaleTargetRef"]
        assert (target["apiVersion"], target["kind"]) == (workload["apiVersion"], workload["kind"])
        assert target["name"] == workload["metadata"]["name"]
        assert "replicas" not in workload["spec"], "each apply would undo what the autoscaler chose"
        least, most = (spec.get(f"{end}Replicas", spec.get(f"{end}ReplicaCount")) for end in ("min", "max"))
        assert 2 <= least < most
        assert least <= spec.get("fallback", {"replicas": least})["replicas"] <= most
    budget = the(combination, "PodDisruptionBudget")["spec"]
    assert "minAvailable" not in budget, "a node with the only replica could never be drained"
    assert 1 <= budget["maxUnavailable"] <= max(1, least - 1), "a drain may take all replicas at once"


@each(DEPLOYED)
def test_all_of_a_deployment_is_in_one_namespace(combination: Combination) -> None:
    for found in build(combination):
        if found["kind"] != "PersistentVolume":
            assert found["metadata"]["namespace"] == NAMESPACE
    names = [(found["kind"], found["metadata"]["name"]) for found in build(combination)]
    assert len(names) == len(set(names))
    for scaler in of_kind(combination, "ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            assert f'namespace="{NAMESPACE}"' in trigger["metadata"]["query"]


@each(DEPLOYED)
def test_the_models_name_is_that_of_its_label(combination: Combination) -> None:
    label = server_pod(combination).labels["ai.gke.io/model"]
    values = environment(combination)
    name = values.get("GEMMA_SERVER_SERVED_MODEL_NAME", values.get("GEMMA_SERVER_MODEL", label))
    assert name in (f"google/{label}", label, "embedded")


def test_what_is_in_the_folders_is_checked() -> None:
    overlays = {path.name for path in (K8S / "overlays").iterdir()}
    components = {path.name for path in (K8S / "components").iterdir()}
    assert overlays == set(SINGLE_HOST + MULTI_HOST)
    assert components == set(ON_ANY + ON_SINGLE_HOST + IN_OVERLAYS)


@pytest.mark.parametrize(
    "directory", sorted({path.parent for path in K8S.rglob("kustomization.yaml")}), ids=str
)
def test_no_manifest_lies_beside_what_is_built(directory: Path) -> None:
    text = (directory / "kustomization.yaml").read_text(encoding="utf-8")
    files = {path.name for path in directory.iterdir()} - {"kustomization.yaml", "epp-values.yaml"}
    assert files == {
        name for name in files if re.search(rf"^ +- (path: )?{re.escape(name)}$", text, re.MULTILINE)
    }


def test_what_is_to_be_filled_in_is_in_the_readme() -> None:
    texts = [path.read_text(encoding="utf-8") for path in K8S.rglob("*") if path.suffix in (".yaml", ".env")]
    places = {place for text in texts for place in re.findall(r"YOUR-[A-Z]+", text)}
    assert places
    assert {place for place in places if place not in README} == set()


@pytest.mark.parametrize("name", [*SINGLE_HOST, *MULTI_HOST, *ON_ANY, *ON_SINGLE_HOST])
def test_the_readme_tells_of_every_overlay_and_component(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize("path", gen_rules.RESOURCES, ids=lambda path: path.parent.name)
def test_the_custom_resources_carry_the_rules(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == gen_rules.resource(*gen_rules.RESOURCES[path]), "run `make docs`"


def test_a_key_that_a_custom_resource_would_lose_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text("groups: [{name: g, rules: [{alert: A, expr: up, keep_firing_for: 5m}]}]")
    monkeypatch.setattr(gen_rules, "RULES", rules)
    with pytest.raises(ValueError, match="keep_firing_for"):
        gen_rules.resource("monitoring.googleapis.com/v1", "Rules")
