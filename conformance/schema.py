"""A validator of the part of JSON Schema that the cases use, independent of what a server enforces it with."""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def violation(value: Any, schema: dict[str, Any], where: str = "$") -> str | None:
    """The first way in which `value` breaks `schema`; None if there is none."""
    if "anyOf" in schema and all(violation(value, option, where) for option in schema["anyOf"]):
        return f"{where} matches no alternative"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}, which is not allowed"
    if "const" in schema and value != schema["const"]:
        return f"{where} is {value!r}, not {schema['const']!r}"
    if "type" in schema and not _is(value, schema["type"]):
        return f"{where} is {value!r}, no {schema['type']}"
    if isinstance(value, dict):
        return _of_object(value, schema, where)
    if isinstance(value, list):
        return _of_array(value, schema, where)
    if isinstance(value, str):
        return _of_string(value, schema, where)
    if _is(value, "number"):
        return _of_number(value, schema, where)
    return None


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _of_object(value: dict[str, Any], schema: dict[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    for key in schema.get("required", ()):
        if key not in value:
            return f"{where} lacks {key!r}"
    for key, item in value.items():
        if key in properties:
            if found := violation(item, properties[key], f"{where}.{key}"):
                return found
        elif schema.get("additionalProperties") is False:
            return f"{where} has {key!r}, which is not allowed"
    return None


def _of_array(value: list[Any], schema: dict[str, Any], where: str) -> str | None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return f"{where} has {len(value)} items"
    found = (violation(item, schema.get("items", {}), f"{where}[{i}]") for i, item in enumerate(value))
    return next((text for text in found if text), None)


def _of_string(value: str, schema: dict[str, Any], where: str) -> str | None:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{where} has {len(value)} characters"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{where} is {value!r}, which does not match {schema['pattern']}"
    return None


def _of_number(value: float, schema: dict[str, Any], where: str) -> str | None:
    if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{where} is {value}, which is out of range"
    return None
