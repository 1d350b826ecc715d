"""The OpenAPI document's part on bodies: the server parses them itself, so FastAPI cannot know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_Structs = type[msgspec.Struct] | tuple[type[msgspec.Struct], ...]
_REF = "#/components/schemas/{}"

_requests: set[type[BaseModel]] = set()
_answers: set[type[msgspec.Struct]] = set()


def body_of(*requests: type[BaseModel], answer: _Structs, stream: _Structs | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that takes any of `requests` and answers with an `answer` or a stream."""
    answers, events = _all(answer), _all(stream)
    _requests.update(requests)
    _answers.update(answers, events)
    content: dict[str, Any] = {"application/json": {"schema": _any_of(answers)}}
    if events:
        names = " or a ".join(event.__name__ for event in events)
        text = f"With `stream`: `data:` events that hold a {names}, then `data: [DONE]`."
        content["text/event-stream"] = {"schema": {"type": "string", "description": text}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _any_of(requests)}}},
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def _all(structs: _Structs | None) -> tuple[type[msgspec.Struct], ...]:
    if structs is None:
        return ()
    return structs if isinstance(structs, tuple) else (structs,)


def _any_of(types: Sequence[type]) -> dict[str, Any]:
    schemas = [{"$ref": _REF.format(one.__name__)} for one in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole OpenAPI document of `app`."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        requests = sorted(_requests, key=lambda model: model.__name__)
        _, definitions = models_json_schema(
            [(model, "validation") for model in requests], ref_template=_REF.format("{model}")
        )
        components.update(definitions.get("$defs", {}))
        answers = sorted(_answers, key=lambda struct: struct.__name__)
        _, definitions = msgspec.json.schema_components(answers, ref_template=_REF.format("{name}"))
        components.update(definitions)
        app.openapi_schema = schema
    return app.openapi_schema
