"""JSON schemas of many kinds, all of whose texts are short enough for a model that knows nothing."""

from __future__ import annotations

from typing import Any


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


_WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
_DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

SCHEMAS: dict[str, dict[str, Any]] = {
    "string": {"type": "string", "maxLength": 12},
    "integer": {"type": "integer", "minimum": -50, "maximum": 1234},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 12},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "const": {"const": {"a": [1, "x"]}},
    "enum": {"enum": ["red", 'qu"oted', "日本", 3, None, True]},
    "types": {"type": ["boolean", "null"]},
    "object": _object({"name": _WORD, "age": _DIGIT}),
    "optional": _object({"a": _DIGIT}, b=_WORD, c={"type": "boolean"}),
    "nested": _object({"outer": _object({"inner": _object({"word": _WORD})})}),
    "map": {"type": "object", "additionalProperties": _DIGIT, "maxProperties": 2},
    "keys": {
        "type": "object",
        "patternProperties": {"^k[0-9]$": _DIGIT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "array": {"type": "array", "items": _WORD, "minItems": 2, "maxItems": 4},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [_DIGIT, _WORD], "items": False, "minItems": 2},
    "table": {
        "type": "array",
        "items": {"type": "array", "items": _DIGIT, "minItems": 1, "maxItems": 2},
        "maxItems": 2,
    },
    "anyOf": {"anyOf": [_object({"kind": {"const": "a"}, "x": _DIGIT}), _object({"kind": {"const": "b"}})]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "oneOf": {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 5}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "definitions": {"$defs": {"word": _WORD}, **_object({"a": {"$ref": "#/$defs/word"}})},
    "recursion": {
        "$defs": {
            "tree": _object({"leaf": _DIGIT}, left={"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]})
        },
        "$ref": "#/$defs/tree",
    },
}
