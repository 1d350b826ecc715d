"""The environment of a custom container on Vertex AI, as options of the server.

Source: "Custom container requirements for prediction" of Vertex AI's documentation. `AIP_HTTP_PORT` or
`AIP_MODE` tell that the server runs there; everywhere else nothing of this is looked at, `MODEL_ID` least of
all.
"""

from __future__ import annotations

from collections.abc import Mapping

_DEFAULT_PORT = "8080"
_PREFIX = "/v1/endpoints/{}/deployedModels/{}"


def on_vertex(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("AIP_HTTP_PORT") or environment.get("AIP_MODE"))


def assumed_options(environment: Mapping[str, str]) -> dict[str, object]:
    """What a server on Vertex AI does unless it is told otherwise."""
    if not on_vertex(environment):
        return {}
    # Requests come from Vertex AI alone, which has asked IAM who sends them.
    return {"host": "0.0.0.0", "port": _DEFAULT_PORT, "allow_unauthenticated": True, "log_format": "json"}


def vertex_options(environment: Mapping[str, str]) -> tuple[dict[str, object], dict[str, str]]:
    """Options that Vertex AI sets, by name, and the variable of each. None outside of Vertex AI."""
    values: dict[str, object] = {}
    variables: dict[str, str] = {}

    def take(name: str, value: object, variable: str) -> None:
        values[name], variables[name] = value, variable

    if not on_vertex(environment):
        return values, variables
    if port := environment.get("AIP_HTTP_PORT"):
        take("port", port, "AIP_HTTP_PORT")
    for variable in ("MODEL_ID", "AIP_STORAGE_URI"):  # the later one wins
        if model := environment.get(variable):
            take("model", model, variable)
    ids = [environment.get(name) for name in ("AIP_ENDPOINT_ID", "AIP_DEPLOYED_MODEL_ID")]
    default = _PREFIX.format(*ids) if all(ids) else None
    if health := environment.get("AIP_HEALTH_ROUTE") or default:
        take("health_route", health, "AIP_HEALTH_ROUTE")
    if predict := environment.get("AIP_PREDICT_ROUTE") or (default and f"{default}:predict"):
        take("predict_route", predict, "AIP_PREDICT_ROUTE")
    return values, variables
