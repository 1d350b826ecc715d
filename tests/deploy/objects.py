"""Looks into the objects that a combination of manifests builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tools.manifests import Combination, Manifest, build, combinations

ALL = combinations()
SINGLE_HOST = [each for each in ALL if each.is_single_host]
"""Those that run this server."""
DEPLOYED = [each for each in ALL if each.overlay != "base"]
SERVER_LABELS = {"app.kubernetes.io/name": "gemma-server", "app.kubernetes.io/component": "inference"}
"""Of the pods that requests go to."""


@dataclass(frozen=True, slots=True)
class Pod:
    """What a workload makes its pods from."""

    workload: Manifest
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def container(self) -> Mapping[str, Any]:
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def serves(self) -> bool:
        return matches(SERVER_LABELS, self.labels)

    @property
    def volumes(self) -> dict[str, Any]:
        return {volume["name"]: volume for volume in self.spec["volumes"]}

    @property
    def mounts(self) -> dict[str, Any]:
        """By their path."""
        return {mount["mountPath"]: mount for mount in self.container["volumeMounts"]}

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}


def of_kind(combination: Combination, *kinds: str) -> list[Manifest]:
    return [each for each in build(combination) if each["kind"] in kinds]


def the(combination: Combination, kind: str) -> Manifest:
    (found,) = of_kind(combination, kind)
    return found


def pods(combination: Combination) -> Iterator[Pod]:
    for each in build(combination):
        if each["kind"] == "Deployment":
            yield _pod(each, each["spec"]["template"])
        elif each["kind"] == "LeaderWorkerSet":
            group = each["spec"]["leaderWorkerTemplate"]
            yield _pod(each, group["leaderTemplate"])
            yield _pod(each, group["workerTemplate"])


def server_pod(combination: Combination) -> Pod:
    """The pod that runs this server, or another engine in its place."""
    (found,) = [pod for pod in pods(combination) if pod.serves]
    return found


def _pod(workload: Manifest, template: Mapping[str, Any]) -> Pod:
    return Pod(workload, template["metadata"]["labels"], template["spec"])


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """As matchLabels selects: an empty selector everything."""
    return selector.items() <= labels.items()


def environment(combination: Combination) -> dict[str, str]:
    """What the server's container has in its environment, of its ConfigMap and of its own."""
    container = server_pod(combination).container
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(combination, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= maps[source["configMapRef"]["name"]]
    return found | {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}


SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}


def quantity(text: str | int) -> float:
    """The number that Kubernetes reads: 4Gi, 800m, "2"."""
    for suffix, factor in SUFFIXES.items():
        if str(text).endswith(suffix):
            return float(str(text).removesuffix(suffix)) * factor
    return float(text)
