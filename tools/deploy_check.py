"""Checks what is deployed, without a cluster (`make deploy-check`).

Builds every combination of manifests, has linters and validators look at them and at the Dockerfile, and runs
the tests in tests/deploy. All checks run, and all that failed are named at the end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tools import manifests

ROOT = Path(__file__).parent.parent
CHECKS = ROOT / "deploy" / "checks"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
BUILT = ROOT / "build" / "k8s"
BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "autoscaling/v2"}
"""API groups of Kubernetes itself that the manifests use; tests compare the others with their own schemas."""
KUBERNETES_VERSIONS = ("1.32", "1.35")
"""An old and a recent version that GKE offers."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy_check")
    parser.add_argument("--tools", type=Path, required=True, help="folder of the programs that are run")
    parser.add_argument("--crds", type=Path, help="folder of CustomResourceDefinitions")
    arguments = parser.parse_args()
    tools, crds = arguments.tools.absolute(), arguments.crds

    started = time.monotonic()
    manifests.write_all(BUILT)
    built_in = _built_in(BUILT)
    print(
        f"built {len(manifests.combinations())} combinations in {time.monotonic() - started:.1f} s", flush=True
    )

    checkov = [tools / "checkov", "--config-file", CHECKS / "checkov.yaml"]
    checks: dict[str, Sequence[str | Path]] = {
        "yamllint": [tools / "yamllint", "--strict", "-c", CHECKS / "yamllint.yaml", ROOT / "deploy"],
    }
    for version in KUBERNETES_VERSIONS:
        validate = [tools / "kubernetes-validate", "--strict", "--quiet", "-k", version]
        checks[f"kubernetes-validate {version}"] = [*validate, *built_in]
    checks["checkov, manifests"] = [*checkov, "--framework", "kubernetes", "-d", BUILT]
    checks["hadolint"] = [tools / "hadolint", "-c", CHECKS / "hadolint.yaml", DOCKERFILE]
    checks["checkov, Dockerfile"] = [*checkov, "--framework", "dockerfile", "-f", DOCKERFILE]
    checks["tests"] = [sys.executable, "-m", "pytest", "-q", ROOT / "tests" / "deploy"]

    environment = dict(os.environ) | ({"CRDS": str(crds.absolute())} if crds else {})
    failed = [name for name, command in checks.items() if not _passes(name, command, environment)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _built_in(directory: Path) -> list[Path]:
    """The built files again, without custom resources, of which kubernetes-validate knows nothing."""
    target = directory.with_name("k8s-built-in")
    target.mkdir(exist_ok=True)
    for old in target.glob("*.yaml"):
        old.unlink()
    paths = []
    for path in sorted(directory.glob("*.yaml")):
        found = yaml.safe_load_all(path.read_text(encoding="utf-8"))
        objects = [each for each in found if each["apiVersion"] in BUILT_IN]
        paths.append(target / path.name)
        paths[-1].write_text(yaml.safe_dump_all(objects), encoding="utf-8")
    return paths


def _passes(name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> bool:
    started = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    print(f"{'ok' if code == 0 else 'FAILED'}  {name} ({time.monotonic() - started:.1f} s)", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
