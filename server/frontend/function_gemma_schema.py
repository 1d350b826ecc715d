"""JSON schemas as rules for values in FunctionGemma's form, in llguidance's Lark.

What the rules of a schema allow is valid, but not all that is valid is allowed: members of an object come in
the order in which the model was told of them, and only those that the schema names, unless it names none or
says `additionalProperties`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from server.frontend.schema_patterns import whole_regex
from server.function_gemma_format import in_order, is_bare, local_definition
from server.grammar_library import MAX_GRAMMAR_CHARS, GrammarError, quoted
from server.tokenizer import ESCAPE

_ANY_KEY = r"/[^\s:,{}\[\]]{1,64}/"
SHARED_RULES = [
    "TEXT: /(?s:.+)/",
    f"KEY: {_ANY_KEY}",
    'any: string | number | "true" | "false" | "null" | any_list | any_object',
    f"string: {ESCAPE} TEXT? {ESCAPE}",
    'number: %json {"type": "number"}',
    'any_list: "[" (any ("," any)*)? "]"',
    'any_object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"',
]
"""What the rules of every schema may refer to."""

_NUMBER_KEYS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_KEYS_OF_TYPE: dict[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _NUMBER_KEYS,
    "number": _NUMBER_KEYS,
    "boolean": set(),
    "null": set(),
    "array": {
        *("items", "minItems", "maxItems", "uniqueItems", "prefixItems"),
        *("contains", "minContains", "maxContains", "unevaluatedItems"),
    },
    "object": {
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "unevaluatedProperties"),
        *("dependentRequired", "dependentSchemas", "dependencies"),
    },
}
"""Keywords that speak of values of one type alone."""
_ALL_TYPES = tuple(name for name in _KEYS_OF_TYPE if name != "integer")
_EXPRESSED = {
    *("minLength", "maxLength", "pattern", "items", "minItems", "maxItems"),
    *("properties", "required", "additionalProperties", *_NUMBER_KEYS),
}
_OF_ANY_TYPE = {"enum", "const", "$ref", "anyOf", "oneOf", "allOf", "not", "if", "then", "else"}
_ASSERTIONS = _OF_ANY_TYPE.union(*_KEYS_OF_TYPE.values())
"""What else a schema holds, but for its `type`, asserts nothing."""
_LONGEST_CHAIN = 30
"""Of references that are all that a schema says."""
_DEEPEST = 64

T = TypeVar("T")


class SchemaRules:
    """The rules of one schema's values, and of its parts."""

    def __init__(self, parameters: dict[str, Any], prefix: str, *, is_loose: bool) -> None:
        """`parameters`: the schema of an object. `prefix`: of all names. `is_loose`: without what cannot be
        expressed.

        Raises GrammarError for what is no schema, can never match, or cannot be expressed.
        """
        if len(json.dumps(parameters)) > MAX_GRAMMAR_CHARS:
            raise GrammarError(f"the schema has more than {MAX_GRAMMAR_CHARS} characters")
        self._root = parameters
        self._prefix = prefix
        self._is_loose = is_loose
        self.rules: list[str] = []
        self._names: dict[str, str] = {}  # of rules and terminals, by what they say
        self._num_names = 0
        self._depth = 0
        self._rule_of_reference: dict[str, str] = {}
        self._to_do: list[tuple[str, Any]] = []  # not by recursion, since there may be thousands
        self.name = self._rule(self._object_schema())
        """Of the rule for the whole."""
        while self._to_do:
            name, definition = self._to_do.pop()
            self.rules.append(f"{name}: {self._value(definition)}")

    def _object_schema(self) -> dict[str, Any]:
        schema = {"type": "object", **(self._root or {"properties": {}})}
        for _ in range(_LONGEST_CHAIN):
            if "$ref" not in schema:
                break
            definition = self._definition(_taken(schema, "$ref", str))
            schema = self._merged({key: schema[key] for key in schema if key != "$ref"}, definition, "$ref")
        return schema

    def _definition(self, reference: str) -> Any:
        definition = local_definition(self._root, reference)
        if definition is None:
            raise GrammarError(f"there is no {reference[:80]!r} in the schema")
        return definition

    def _new_name(self) -> str:
        self._num_names += 1
        return f"{self._prefix}_{self._num_names}"

    def _named(self, expression: str, *, is_terminal: bool = False) -> str:
        """The name of a rule."""
        if expression not in self._names:
            name = self._new_name()
            self._names[expression] = name.upper() if is_terminal else name
            self.rules.append(f"{self._names[expression]}: {expression}")
        return self._names[expression]

    def _rule(self, schema: Any) -> str:
        """The name of a rule for the values of a schema."""
        expression = self._value(schema)
        return expression if expression.isidentifier() else self._named(expression)

    def _value(self, schema: Any) -> str:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise GrammarError(f"the schema is nested deeper than {_DEEPEST} levels")
        expression = self._expression(schema)
        self._depth -= 1
        return expression

    def _expression(self, schema: Any) -> str:
        if schema is True:
            return "any"
        if not isinstance(schema, dict):
            raise GrammarError("a part of it is no JSON schema, or one that nothing matches")
        for key in ("allOf", "anyOf", "oneOf"):
            if key in schema:
                return self._combined(key, dict(schema))
        if "$ref" in schema:
            self._refuse(schema, _ASSERTIONS - {"$ref"})
            return self._referred(schema)
        self._refuse(schema, _OF_ANY_TYPE - {"enum", "const"})
        if "const" in schema or "enum" in schema:
            return self._enumeration(schema)
        types = _types(schema)
        return "any" if types == _ALL_TYPES else " | ".join(self._of_type(name, schema) for name in types)

    def _refuse(self, schema: dict[str, Any], keywords: Iterable[str]) -> None:
        """Where all has to be enforced, these keywords cannot be used."""
        found = sorted(schema.keys() & set(keywords))
        if found and not self._is_loose:
            raise GrammarError(f"calls in FunctionGemma's form cannot be held to {', '.join(map(repr, found))}")

    def _referred(self, schema: dict[str, Any]) -> str:
        reference = _taken(schema, "$ref", str)
        definition = self._definition(reference)
        if "type" in schema and (not isinstance(definition, dict) or definition.get("type") != schema["type"]):
            self._refuse(schema, {"$ref"})
        if reference not in self._rule_of_reference:
            name = self._rule_of_reference[reference] = self._new_name()
            self._to_do.append((name, definition))
        return self._rule_of_reference[reference]

    def _combined(self, key: str, rest: dict[str, Any]) -> str:
        schemas = rest.pop(key)
        if not isinstance(schemas, list) or not schemas:
            raise GrammarError(f"{key!r} must be a list of schemas")
        if key == "allOf":
            for schema in schemas:
                rest = self._merged(rest, schema, key)
            return self._value(rest)
        if key == "oneOf" and not _are_apart(schemas):
            self._refuse({key: schemas}, {key})
        return " | ".join(self._rule(self._merged(rest, schema, key)) for schema in schemas)

    def _merged(self, schema: dict[str, Any], other: Any, key: str) -> dict[str, Any]:
        """One schema of what matches both; `schema`, where none says that and not all has to be enforced.

        `key`: where `other` comes from.
        """
        if other is True:
            return schema
        if isinstance(other, dict):
            merged = {**schema, **other}
            said, also_said = ({"type", *_ASSERTIONS} & keys.keys() for keys in (schema, other))
            in_both = said & also_said
            if "required" in in_both:
                merged["required"] = [*_taken(schema, "required", list), *_taken(other, "required", list)]
                in_both -= {"required"}
            # `additionalProperties` are those that the `properties` beside it do not name.
            members, other_members = (
                {"properties", "additionalProperties"} & keys for keys in (said, also_said)
            )
            are_apart = not members or not other_members or members == other_members
            if are_apart and all(schema[name] == other[name] for name in in_both):
                return merged
        self._refuse({key: other}, {key})
        return schema

    def _enumeration(self, schema: dict[str, Any]) -> str:
        self._refuse(schema, _ASSERTIONS - {"enum", "const"})
        values = [schema["const"]] if "const" in schema else _taken(schema, "enum", list)
        types = _types({"type": schema["type"]}) if "type" in schema else _ALL_TYPES
        matching = [value for value in values if any(_is_of_type(value, name) for name in types)]
        if not matching:
            raise GrammarError("an enumeration has no value of its type")
        return " | ".join(_literal(value) for value in matching)

    def _of_type(self, name: str, schema: dict[str, Any]) -> str:
        self._refuse(schema, _KEYS_OF_TYPE[name] - _EXPRESSED)
        match name:
            case "string":
                return self._string(schema)
            case "number" | "integer":
                limits = {key: schema[key] for key in sorted(_NUMBER_KEYS & schema.keys())}
                return self._named(f"%json {json.dumps({'type': name, **limits})}")
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"null"'
            case "array":
                return self._array(schema)
        return self._object(schema)

    def _string(self, schema: dict[str, Any]) -> str:
        terms: list[str] = []
        if {"minLength", "maxLength"} & schema.keys():
            terms.append(f"/(?s:.{{{_counts(*_limits(schema, 'minLength', 'maxLength'))}}})/")
        if "pattern" in schema:
            regex = whole_regex(_taken(schema, "pattern", str))
            if regex is None:
                self._refuse(schema, {"pattern"})
            else:
                terms.append(f"/{regex}/")
        return f"{ESCAPE} {self._named(' & '.join(terms), is_terminal=True)} {ESCAPE}" if terms else "string"

    def _array(self, schema: dict[str, Any]) -> str:
        least, most = _limits(schema, "minItems", "maxItems")
        if most == 0:
            return '"[" "]"'
        item = self._rule(schema.get("items", True))
        items = f'{item} ("," {item}){{{_counts(max(least - 1, 0), None if most is None else most - 1)}}}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _object(self, schema: dict[str, Any]) -> str:
        named, required = _taken(schema, "properties", dict, {}), _taken(schema, "required", list, [])
        if not all(isinstance(name, str) for name in required):
            raise GrammarError("'required' must be a list of names")
        members = in_order({**{name: True for name in required}, **named})
        others = schema.get("additionalProperties", "properties" not in schema)
        # From the last member to the first: what may begin the object there, and what may go on with it.
        firsts: list[str] = []
        tail = '""'
        if others is not False:
            other = f'{self._new_key(name for name, _ in members)} ":" {self._rule(others)}'
            firsts, tail = [f'{other} ("," {other})*'], f'("," {other})*'
        for name, member in reversed(members):
            behind = self._named(tail)
            pair = self._named(f"{_key(name)} {self._rule(member)}")
            if name in required:
                firsts, tail = [f"{pair} {behind}"], f'"," {pair} {behind}'
            else:
                firsts, tail = [f"{pair} {behind}", *firsts], f'("," {pair})? {behind}'
        if not firsts:
            return '"{" "}"'
        return f'"{{" ({" | ".join(firsts)}){"" if required else "?"} "}}"'

    def _new_key(self, taken: Iterable[str]) -> str:
        """The name of a terminal for keys other than those that are taken."""
        names = "|".join(re.escape(name).replace("/", r"\/") for name in taken if is_bare(name))
        return self._named(f"{_ANY_KEY} & ~/{names}/", is_terminal=True) if names else "KEY"


def _key(name: str) -> str:
    return quoted(f"{name}:") if is_bare(name) else f'{_literal(name)} ":"'


def _literal(value: Any) -> str:
    """An expression for one value."""
    match value:
        case str():
            return f"{ESCAPE} {quoted(value)} {ESCAPE}" if value else f"{ESCAPE} {ESCAPE}"
        case dict():
            members = ' "," '.join(f"{_key(key)} {_literal(member)}" for key, member in in_order(value))
            return f'"{{" {members} "}}"'
        case list():
            items = ' "," '.join(map(_literal, value))
            return f'"[" {items} "]"'
    return quoted(json.dumps(value))


def _types(schema: dict[str, Any]) -> tuple[str, ...]:
    """Those it allows; without a word of that, those that it speaks of, or all."""
    if "type" not in schema:
        return tuple(name for name in _ALL_TYPES if _KEYS_OF_TYPE[name] & schema.keys()) or _ALL_TYPES
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    for name in names:
        if not isinstance(name, str) or name not in _KEYS_OF_TYPE:
            raise GrammarError(f"there is no type {str(name)[:80]!r}")
    if not names:
        raise GrammarError("'type' names no type")
    return tuple(names)


def _is_of_type(value: Any, name: str) -> bool:
    match value:
        case bool():
            return name == "boolean"
        case int():
            return name in ("integer", "number")
        case float():
            return name == "number" or (name == "integer" and value.is_integer())
        case str():
            return name == "string"
        case list():
            return name == "array"
        case dict():
            return name == "object"
    return name == "null"


def _are_apart(schemas: list[Any]) -> bool:
    """Whether no value matches two of them, as far as their types tell."""
    types = [
        name for schema in schemas if isinstance(schema, dict) and "type" in schema for name in _types(schema)
    ]
    names = {"number" if name == "integer" else name for name in types}
    return len(names) == len(types) and all(isinstance(schema, dict) and "type" in schema for schema in schemas)


def _limits(schema: dict[str, Any], least: str, most: str) -> tuple[int, int | None]:
    lowest = _taken(schema, least, int, 0)
    highest = _taken(schema, most, int) if most in schema else None
    if lowest < 0 or (highest is not None and highest < lowest):
        raise GrammarError(f"nothing matches its {least!r} and {most!r}")
    return lowest, highest


def _counts(least: int, most: int | None) -> str:
    """Between the braces of a repetition."""
    return f"{least},{'' if most is None else most}"


def _taken(schema: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = schema.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GrammarError(f"{key!r} must be {_KINDS[kind]}")
    return value


_KINDS: dict[type, str] = {str: "a string", int: "an integer", list: "a list", dict: "an object"}
