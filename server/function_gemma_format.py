"""How tools, their calls and their results look to FunctionGemma, whose tokenizer has control tokens for them.

The form is that of "FunctionGemma formatting and best practices" (ai.google.dev) and of the checkpoint's
template. `<escape>` stands before and behind every string, names are bare:

    declaration:get_weather{description:<escape>…<escape>,parameters:{properties:{city:{…}},type:…}}
    call:get_weather{city:<escape>Paris<escape>,days:3}
    response:get_weather{sky:<escape>clear<escape>}

What the template leaves out is told here: parameters with names like `type`, enumerations of numbers, types
that stand in a reference or an alternative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from server.chat_template import ControlToken
from server.tokenizer import (
    END_CALL,
    END_DECLARATION,
    END_RESPONSE,
    ESCAPE,
    START_CALL,
    START_DECLARATION,
    START_RESPONSE,
    Tokenizer,
)
from server.tool_format import Tool, ToolCall

_STRUCTURE = frozenset(":,{}[]")
_DECLARED = ("description", "enum", "items", "properties", "required", "type")
"""What is told of a parameter, in this order, which is the alphabet's."""
_EMPTY: tuple[Any, ...] = ({}, [])
_DEEPEST = 30
"""Schemas in schemas of which more than the type is told: no model of this size would use it."""
_LONGEST_CHAIN = 30
"""References to references."""


def is_bare(key: str) -> bool:
    """Whether a key can stand in a call without `<escape>` around it."""
    return bool(key) and key == key.strip() and not _STRUCTURE & set(key)


def in_order(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The order in which FunctionGemma reads and writes parameters: Jinja's `dictsort`."""
    return sorted(mapping.items(), key=lambda item: item[0].lower())


def local_definition(root: Any, reference: str) -> Any:
    """What a `$ref` into the schema itself refers to; None if that is nothing, or elsewhere."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    found = root
    for step in reference.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, dict) else None
    return found


class SegmentWriter:
    """Segments of a prompt, one behind another. A client's words are written by `text`, never by `token`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._segments: list[ControlToken | str] = []
        self._texts: list[str] = []

    def segments(self) -> tuple[ControlToken | str, ...]:
        """Control tokens and texts, of which no two are neighbours."""
        self._join_texts()
        return tuple(self._segments)

    def text(self, text: str) -> None:
        self._texts.append(text)

    def token(self, piece: str) -> None:
        self._join_texts()
        self._segments.append(ControlToken(self._tokenizer.control_id(piece), piece))

    def declaration(self, tool: Tool) -> None:
        self.token(START_DECLARATION)
        self.text(f"declaration:{tool.name}{{description:")
        self._string(tool.description)
        if tool.parameters:
            self.text(",parameters:")
            _SchemaWriter(self, tool.parameters).parameters()
        self.text("}")
        self.token(END_DECLARATION)

    def call(self, call: ToolCall) -> None:
        """One whose arguments are no JSON object, such as one cut off, is written as it is."""
        self.token(START_CALL)
        self.text(f"call:{call.name}")
        arguments = _json_object(call.arguments or "{}")
        if arguments is None:
            self.text(f"{{{call.arguments}}}")
        else:
            self.value(arguments)
        self.token(END_CALL)

    def result(self, name: str, text: str) -> None:
        """A JSON object gives its members; any other text is the one member `value`."""
        self.token(START_RESPONSE)
        self.text(f"response:{name}")
        members = _json_object(text)
        self.value({"value": text.strip()} if members is None else members)
        self.token(END_RESPONSE)

    def value(self, value: Any, *, escapes_keys: bool = False) -> None:
        """A value of JSON."""
        match value:
            case str():
                self._string(value)
            case dict():
                self.text("{")
                for number, (key, member) in enumerate(in_order(value)):
                    self.text("," if number else "")
                    if is_bare(key) and not escapes_keys:
                        self.text(key)
                    else:
                        self._string(key)
                    self.text(":")
                    self.value(member, escapes_keys=escapes_keys)
                self.text("}")
            case list():
                self.text("[")
                for number, item in enumerate(value):
                    self.text("," if number else "")
                    self.value(item, escapes_keys=escapes_keys)
                self.text("]")
            case _:
                self.text(json.dumps(value))

    def _string(self, text: str) -> None:
        self.token(ESCAPE)
        self.text(text)
        self.token(ESCAPE)

    def _join_texts(self) -> None:
        text = "".join(self._texts)
        if text:
            self._segments.append(text)
        self._texts.clear()


class _SchemaWriter:
    """Tells of the schema of a tool's parameters. Each of its definitions is spelled out where it is met first,
    so that the work is linear."""

    def __init__(self, writer: SegmentWriter, root: dict[str, Any]) -> None:
        self._writer = writer
        self._root = root
        self._met: set[str] = set()
        self._depth = 0

    def parameters(self) -> None:
        schema = {**self._resolved(self._root), "type": "object"}
        self._members(
            [
                (key, schema[key])
                for key in ("properties", "required", "type")
                if schema.get(key, []) not in _EMPTY
            ]
        )

    def _property(self, schema: Any) -> None:
        schema = {"description": "", "type": "", **self._resolved(schema)}
        if schema["type"] == "object":
            schema.setdefault("properties", {})
        self._members([(key, schema[key]) for key in _DECLARED if schema.get(key, []) not in (None, [])])

    def _items(self, schema: Any) -> None:
        """All that is said of a list's items is told, as the template has it."""
        self._members([(key, value) for key, value in in_order(self._resolved(schema)) if value is not None])

    def _members(self, members: list[tuple[str, Any]]) -> None:
        self._depth += 1
        self._writer.text("{")
        for number, (key, value) in enumerate(members):
            self._writer.text(f"{',' if number else ''}{key}:")
            match key, value:
                case "properties", dict():
                    self._writer.text("{")
                    for position, (name, schema) in enumerate(in_order(value)):
                        self._writer.text(f"{',' if position else ''}{name}:")
                        self._property(schema)
                    self._writer.text("}")
                case "items", dict():
                    self._items(value)
                case "type", str():
                    self._writer.value(value.upper())
                case _:
                    self._writer.value(value, escapes_keys=True)
        self._writer.text("}")
        self._depth -= 1

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """What is to be told, with what a reference or the first alternative that is not `null` says of it."""
        resolved: dict[str, Any] = {}
        for _ in range(_LONGEST_CHAIN):
            layer = dict(schema) if isinstance(schema, dict) else {}
            reference = layer.pop("$ref", None)
            alternatives = [layer.pop(key, None) for key in ("anyOf", "oneOf", "allOf")]
            resolved = {**layer, **resolved}
            if isinstance(reference, str):
                schema = local_definition(self._root, reference)
                if reference in self._met:
                    resolved.setdefault("type", _type_of(schema if isinstance(schema, dict) else {}))
                    break
                self._met.add(reference)
                continue
            schema = _first_alternative(alternatives)
            if schema is None:
                break
        if self._depth > _DEEPEST:
            resolved.pop("properties", None)
            resolved.pop("items", None)
        if type_name := _type_of(resolved):
            resolved["type"] = type_name
        return resolved


def _first_alternative(alternatives: list[Any]) -> Any:
    """Of lists of schemas, the first that is not only `null`; None if there is none."""
    for schemas in alternatives:
        for schema in schemas if isinstance(schemas, list) else ():
            if not isinstance(schema, dict) or schema.get("type") != "null":
                return schema
    return None


def _type_of(schema: dict[str, Any]) -> str:
    """The first that is not `null`, or the one that the schema is about; empty if it is about several."""
    types = schema.get("type")
    for name in types if isinstance(types, list) else [types]:
        if isinstance(name, str) and name != "null":
            return name
    if "properties" in schema:
        return "object"
    values = schema.get("enum", [schema.get("const")])
    return "string" if isinstance(values, list) and all(isinstance(value, str) for value in values) else ""


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = from_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
