"""What runs: probes, the end, resources, volumes, and what it may do."""

from __future__ import annotations

import re

import pytest

from server import __version__, http_server
from tests.api.support import LiveServer
from tests.deploy.objects import (
    ALL,
    DEPLOYED,
    SERVER_LABELS,
    SINGLE_HOST,
    environment,
    of_kind,
    pods,
    quantity,
    server_pod,
    the,
)
from tools.manifests import Combination

PROBES = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
SIDECAR_VOLUMES = {"gke-gcsfuse-cache", "gke-gcsfuse-buffer", "gke-gcsfuse-tmp"}
"""GKE's sidecar takes them by name; no container of ours mounts them."""


def each(combinations: list[Combination]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("combination", combinations, ids=str)


@each(SINGLE_HOST)
def test_each_probe_asks_its_own_question_of_the_port_that_the_server_listens_on(
    combination: Combination,
) -> None:
    pod = server_pod(combination)
    for probe, path in PROBES.items():
        assert pod.container[probe]["httpGet"] == {"path": path, "port": "http"}
    assert pod.ports == {"http": int(environment(combination)["GEMMA_SERVER_PORT"])}


@each(ALL)
def test_what_probes_and_scrapers_ask_for_is_there_without_a_key(
    running: LiveServer, combination: Combination
) -> None:
    container = server_pod(combination).container
    paths = {container[probe]["httpGet"]["path"] for probe in PROBES}
    for monitor in of_kind(combination, "PodMonitoring", "ServiceMonitor"):
        paths |= {endpoint["path"] for endpoint in monitor["spec"]["endpoints"]}
    for policy in of_kind(combination, "HealthCheckPolicy"):
        paths.add(policy["spec"]["default"]["config"]["httpHealthCheck"]["requestPath"])
    assert {path: running.http.get(path).status_code for path in paths} == dict.fromkeys(paths, 200)


@each(ALL)
def test_probes_have_time_to_load_and_none_to_send_requests_to_a_pod_that_ends(
    combination: Combination,
) -> None:
    container = server_pod(combination).container
    startup, readiness, liveness = (container[probe] for probe in PROBES)
    load_seconds = startup["periodSeconds"] * startup["failureThreshold"]
    assert load_seconds >= 1800
    for deployment in of_kind(combination, "Deployment"):
        assert deployment["spec"]["progressDeadlineSeconds"] > load_seconds
    assert readiness["failureThreshold"] * readiness["periodSeconds"] <= 2
    assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 60


@each(SINGLE_HOST)
def test_a_pod_is_killed_only_after_its_hook_and_the_servers_own_deadlines(combination: Combination) -> None:
    pod, values = server_pod(combination), environment(combination)
    hook = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    delay, timeout = (float(values[f"GEMMA_SERVER_SHUTDOWN_{name}"]) for name in ("DELAY", "TIMEOUT"))
    least = hook + delay + timeout + http_server._FORCED_SECONDS
    assert least <= pod.spec["terminationGracePeriodSeconds"]
    assert hook > 0, "endpoints are told in parallel: without a pause requests meet a closed port"
    for policy in of_kind(combination, "GCPBackendPolicy"):
        assert policy["spec"]["default"]["connectionDraining"]["drainingTimeoutSec"] <= timeout


@each(ALL)
def test_a_rollout_takes_no_pod_away_before_another_is_ready_unless_asked_to(
    combination: Combination,
) -> None:
    for deployment in of_kind(combination, "Deployment"):
        strategy = deployment["spec"]["strategy"]
        if "recreate" in combination.components:
            assert strategy == {"type": "Recreate"}
        else:
            assert strategy == {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            }
        assert deployment["spec"]["minReadySeconds"] > 0


@each(ALL)
def test_images_are_versions(combination: Combination) -> None:
    for pod in pods(combination):
        name, _, tag = pod.container["image"].rpartition(":")
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), pod.container["image"]
        if name == "gemma-server":
            assert tag == __version__


@each(ALL)
def test_every_pod_asks_for_what_it_may_use(combination: Combination) -> None:
    for pod in pods(combination):
        requests, limits = (pod.container["resources"][kind] for kind in ("requests", "limits"))
        assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys()
        # What a pod uses beyond its requests is taken from it when the node is short, in the middle of streams.
        assert {name: requests[name] for name in limits} == limits
        assert {"memory", "ephemeral-storage"} <= limits.keys()


@each(ALL)
def test_a_pod_with_a_gpu_goes_to_a_node_that_has_one(combination: Combination) -> None:
    for pod in pods(combination):
        has_gpu = "nvidia.com/gpu" in pod.container["resources"]["limits"]
        assert has_gpu == ("cloud.google.com/gke-accelerator" in pod.spec.get("nodeSelector", {}))
        tolerated = {toleration["key"] for toleration in pod.spec.get("tolerations", ())}
        assert has_gpu == ("nvidia.com/gpu" in tolerated)
        if pod in pods(combination) and combination.is_single_host:
            values = environment(combination)
            assert has_gpu == (values.get("GEMMA_SERVER_DEVICE") == "cuda")
            assert has_gpu == ("LD_LIBRARY_PATH" in values)


@each(ALL)
def test_volumes_are_there_used_and_bounded(combination: Combination) -> None:
    for pod in pods(combination):
        mounted = [mount["name"] for mount in pod.container["volumeMounts"]]
        assert len(mounted) == len(pod.mounts), "two volumes at one path"
        assert set(mounted) == pod.volumes.keys() - SIDECAR_VOLUMES
        limits = pod.container["resources"]["limits"]
        empty = {name: volume["emptyDir"] for name, volume in pod.volumes.items() if "emptyDir" in volume}
        sizes = {name: quantity(volume["sizeLimit"]) for name, volume in empty.items()}
        # The sidecar's are its own, and have no limit.
        ours = sizes.keys() - SIDECAR_VOLUMES
        in_memory = sum(sizes[name] for name in ours if empty[name].get("medium") == "Memory")
        on_disk = sum(sizes[name] for name in ours) - in_memory
        assert in_memory < quantity(limits["memory"])
        assert on_disk < quantity(limits["ephemeral-storage"]), "no room is left for logs"


@each(ALL)
def test_what_only_is_read_is_mounted_so(combination: Combination) -> None:
    for pod in pods(combination):
        for path, mount in pod.mounts.items():
            assert mount.get("readOnly", False) == ("emptyDir" not in pod.volumes[mount["name"]]), path


@each(SINGLE_HOST)
def test_the_server_runs_under_the_strictest_pod_security_standard(combination: Combination) -> None:
    pod = server_pod(combination)
    assert (
        pod.spec["securityContext"].items()
        >= {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }.items()
    )
    assert pod.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@each(ALL)
def test_no_pod_can_ask_the_cluster_or_become_more_than_it_is(combination: Combination) -> None:
    for pod in pods(combination):
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        assert not any("hostPath" in volume for volume in pod.volumes.values())
        assert pod.spec["automountServiceAccountToken"] is False
        # A Service of this name would set GEMMA_SERVER_PORT=tcp://..., and VLLM_PORT is vLLM's.
        assert pod.spec["enableServiceLinks"] is False
        assert pod.container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod.container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert the(combination, "ServiceAccount")["automountServiceAccountToken"] is False
    assert not of_kind(combination, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret")


@each(ALL)
def test_pods_say_what_they_are(combination: Combination) -> None:
    for pod in pods(combination):
        assert {"ai.gke.io/inference-server", "app.kubernetes.io/name"} <= pod.labels.keys()
    # The metrics have vLLM's names, which endpoint pickers look for where this label says so.
    assert server_pod(combination).labels["llm-d.ai/engine-type"] == "vllm"
    if combination in DEPLOYED:
        assert "ai.gke.io/model" in server_pod(combination).labels
    for found in of_kind(combination, "Deployment", "Service", "PodDisruptionBudget", "ServiceAccount"):
        assert found["metadata"]["labels"].items() >= SERVER_LABELS.items()
