"""Custom resources against their schemas, where unknown fields are errors: a cluster drops them without a word.

Schemas of some are in schemas/, as far as we use them. Those of the others are their projects' definitions
(CustomResourceDefinition), in a folder that the variable CRDS names: `make deploy-check CRDS=DIR`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.objects import ALL
from tests.deploy.test_workloads import each
from tools.manifests import Combination, Manifest, build

SCHEMAS = Path(__file__).parent / "schemas"
BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "autoscaling/v2"}
"""Of Kubernetes itself; `make deploy-check` has kubernetes-validate look at them."""
FROM_CRDS = {
    "InferenceObjective": "llm-d.ai/v1alpha2",
    "InferencePool": "inference.networking.k8s.io/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "PodMonitoring": "monitoring.googleapis.com/v1",
    "Rules": "monitoring.googleapis.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def custom(combination: Combination) -> list[Manifest]:
    return [found for found in build(combination) if found["apiVersion"] not in BUILT_IN]


def schema_of_ours(kind: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    schema["properties"]["metadata"] = METADATA
    return schema


def schemas_of_crds(directory: Path) -> dict[str, dict[str, Any]]:
    """By kind, of the versions that we use."""
    found = {}
    for path in sorted(directory.glob("*.y*ml")):
        for crd in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            spec = crd["spec"]
            for version in spec["versions"]:
                kind = spec["names"]["kind"]
                if FROM_CRDS.get(kind) == f"{spec['group']}/{version['name']}":
                    schema = strict(version["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = METADATA
                    found[kind] = schema
    return found


def strict(schema: Any) -> Any:
    """A structural schema in JSON Schema's terms, in which fields that it does not know are errors."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if result.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if result.get("format") in ("int32", "int64"):
        result.pop("format")
    if isinstance(result.get("properties"), dict) and result.get("type") == "object":
        is_open = result.get("x-kubernetes-preserve-unknown-fields", False)
        result.setdefault("additionalProperties", bool(is_open))
    return result


@pytest.fixture(scope="module")
def crds() -> dict[str, dict[str, Any]]:
    if not os.environ.get("CRDS"):
        pytest.skip(
            f"{', '.join(FROM_CRDS)} are compared with NO schema: say `make deploy-check CRDS=DIR`, where "
            "DIR holds their CustomResourceDefinitions from their projects' releases"
        )
    directory = Path(os.environ["CRDS"])
    found = schemas_of_crds(directory)
    assert found.keys() == FROM_CRDS.keys(), f"{directory} lacks a CustomResourceDefinition that we use"
    return found


@each([combination for combination in ALL if custom(combination)])
def test_custom_resources_are_of_kinds_that_have_a_schema(combination: Combination) -> None:
    for found in custom(combination):
        kind = found["kind"]
        if (SCHEMAS / f"{kind}.json").exists():
            jsonschema.validate(found, schema_of_ours(kind))
        else:
            assert FROM_CRDS.get(kind) == found["apiVersion"], f"no schema for {found['apiVersion']} {kind}"


def test_custom_resources_fit_their_definitions(crds: dict[str, dict[str, Any]]) -> None:
    checked = set()
    for combination in ALL:
        for found in custom(combination):
            if found["kind"] in crds:
                jsonschema.validate(found, crds[found["kind"]])
                checked.add(found["kind"])
    assert checked == crds.keys()


def test_a_misspelled_field_of_a_custom_resource_is_found(crds: dict[str, dict[str, Any]]) -> None:
    (found,) = [
        each
        for each in build(Combination("gemma-2b-l4", ("podmonitoring-gmp",)))
        if each["kind"] == "PodMonitoring"
    ]
    wrong = json.loads(json.dumps(found))
    wrong["spec"]["endpoints"][0]["intervall"] = "15s"
    with pytest.raises(jsonschema.ValidationError, match="intervall"):
        jsonschema.validate(wrong, crds["PodMonitoring"])


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_our_own_schemas_are_strict_and_used(path: Path) -> None:
    def objects(schema: Any) -> list[dict[str, Any]]:
        if isinstance(schema, list):
            return [inner for each in schema for inner in objects(each)]
        if not isinstance(schema, dict):
            return []
        inner = [found for value in schema.values() for found in objects(value)]
        return [schema, *inner] if schema.get("type") == "object" else inner

    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert all("additionalProperties" in found for found in objects(schema))
    assert any(found["kind"] == path.stem for combination in ALL for found in build(combination))
