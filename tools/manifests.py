"""Builds the manifests of deploy/k8s with `kubectl kustomize`.

An overlay is deployed as it is, or with components on top. Which go together is said here once, and every check
of the manifests walks through it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).resolve().parent.parent / "deploy" / "k8s"

SINGLE_HOST = ("gemma-2b-l4", "gemma-7b-l4", "gemma-7b-a100", "cpu-demo")
"""Overlays that run this server."""
MULTI_HOST = ("multi-host-vllm",)
"""Overlays that run another engine behind the same names."""

ON_ANY = ("podmonitoring-gmp", "prometheus-operator", "inference-gateway")
ON_SINGLE_HOST = ("hf-token", "gcsfuse", "hyperdisk-ml", "hpa-gmp", "keda", "recreate", "spot", "no-keys")
IN_OVERLAYS = ("gpu", "gpu-l4", "gpu-a100")
"""Components that overlays bring, and nobody adds."""

STACKS = (
    ("gemma-2b-l4", ("podmonitoring-gmp", "hpa-gmp", "inference-gateway", "no-keys")),
    ("gemma-7b-l4", ("hyperdisk-ml", "recreate", "podmonitoring-gmp")),
    ("gemma-7b-a100", ("prometheus-operator", "keda", "hf-token", "spot")),
    ("gemma-7b-a100", ("gcsfuse", "podmonitoring-gmp", "hpa-gmp", "inference-gateway")),
)
"""What somebody would deploy: several components at once."""

Manifest = dict[str, Any]
"""One object of Kubernetes."""


@dataclass(frozen=True, slots=True)
class Combination:
    overlay: str
    """Of overlays/; or `base`."""
    components: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join((self.overlay, *self.components))

    @property
    def is_single_host(self) -> bool:
        return self.overlay not in MULTI_HOST


def combinations() -> list[Combination]:
    """The base, each overlay, each component on an overlay that it fits, and the stacks."""
    pairs = [("gemma-2b-l4", name) for name in ON_ANY + ON_SINGLE_HOST]
    pairs += [(overlay, name) for overlay in MULTI_HOST for name in ON_ANY]
    return [
        Combination("base"),
        *map(Combination, SINGLE_HOST + MULTI_HOST),
        *(Combination(overlay, (name,)) for overlay, name in pairs),
        *(Combination(overlay, components) for overlay, components in STACKS),
    ]


def render(combination: Combination) -> str:
    """The YAML that would be applied. Raises CalledProcessError, whose stderr says what does not fit."""
    below = K8S / "base" if combination.overlay == "base" else K8S / "overlays" / combination.overlay
    if not combination.components:
        return _kustomize(below)
    # Outside of the tree, as who deploys it would have it.
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory).resolve()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "gemma",
            "resources": [os.path.relpath(below, here)],
            "components": [os.path.relpath(K8S / "components" / name, here) for name in combination.components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        return _kustomize(here)


@functools.cache
def build(combination: Combination) -> tuple[Manifest, ...]:
    """The objects of a combination; shared, so change none of them."""
    return tuple(yaml.safe_load_all(render(combination)))


def _kustomize(directory: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def write_all(target: Path) -> None:
    """Writes NAME.yaml for each combination, and removes what was there before."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.yaml"):
        old.unlink()
    for combination in combinations():
        (target / f"{combination}.yaml").write_text(render(combination), encoding="utf-8")
