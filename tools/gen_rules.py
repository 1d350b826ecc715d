"""Writes the custom resources that carry deploy/observability/rules.yml into a cluster (`make docs`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
RULES = ROOT / "deploy" / "observability" / "rules.yml"
COMPONENTS = ROOT / "deploy" / "k8s" / "components"

RESOURCES = {
    COMPONENTS / "podmonitoring-gmp" / "rules.yaml": ("monitoring.googleapis.com/v1", "Rules"),
    COMPONENTS / "prometheus-operator" / "rules.yaml": ("monitoring.coreos.com/v1", "PrometheusRule"),
}

GROUP_KEYS = {"name", "interval", "rules"}
RULE_KEYS = {"record", "alert", "expr", "for", "labels", "annotations"}
"""What both resources have. Prometheus knows more (`limit`, `keep_firing_for`), Google's resource does not."""

_HEAD = "# Written by `make docs` from deploy/observability/rules.yml; do not edit it by hand.\n"


class _Dumper(yaml.SafeDumper):
    """Indents lists as the other manifests do, and keeps the breaks of long texts."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def resource(api_version: str, kind: str) -> str:
    """The text of one resource. Raises ValueError for a key that one of the two would lose."""
    groups: list[dict[str, Any]] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for group in groups:
        unknown = set(group) - GROUP_KEYS | {key for rule in group["rules"] for key in set(rule) - RULE_KEYS}
        if unknown:
            raise ValueError(f"{RULES}: group {group['name']}: {sorted(unknown)} is in no custom resource")
    manifest = {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": "gemma-server", "labels": {"app.kubernetes.io/name": "gemma-server"}},
        "spec": {"groups": groups},
    }
    return _HEAD + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def main() -> None:
    for path, (api_version, kind) in RESOURCES.items():
        path.write_text(resource(api_version, kind), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
