"""Which tools a turn may call, and the grammar that its text must match so that every call is one.

A call begins where `{"name": "NAME"` is complete, NAME being a tool that may be called. The text before it is
free, but for that beginning: other JSON is text. What follows it is constrained.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from server.tool_format import Tool, declarations_text

MAX_SCHEMA_CHARS = 65_536
"""Of a tool's parameters as JSON: the time to compile a schema grows with the square of its size."""
MAX_SCHEMAS_CHARS = 4 * MAX_SCHEMA_CHARS
"""Of all tools' of a request together."""

CALL_HEAD = r'\{[ \t\r\n]{0,16}"name"[ \t\r\n]{0,4}:[ \t\r\n]{0,4}"'
"""A regular expression, to Python as to the grammar: a call up to its name."""

_ARGUMENTS_HEAD = r',[ \t\r\n]{0,16}"parameters"[ \t\r\n]{0,4}:[ \t\r\n]{0,4}'
_CALL_END = r"[ \t\r\n]{0,16}\}"
_GAP = r"[ ,\]\r\n]{0,8}(```[a-z_]{0,16}[ \[\r\n]{0,8}){0,2}"
"""Between calls and after them: models fence calls, or make a list of them."""
_JSON_SPACE = r"[ \t\r\n]{0,32}"
"""Bounded: a model that has lost its way would write spaces for ever."""
_COMBINING_KEYS = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties", "dependentSchemas"}
)


class SchemaError(ValueError):
    """A tool's parameters are no schema that the arguments can be held to."""


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request says about tools; without any the model is told nothing, and writes free text."""

    tools: tuple[Tool, ...] = ()
    """That the model is told of."""
    names: frozenset[str] = frozenset()
    """Of those that it may call; not empty if `tools` is not."""
    is_required: bool = False
    """Whether it must call one, and write nothing else."""
    is_parallel: bool = True
    """Whether it may call several."""

    @property
    def declarations(self) -> str:
        return declarations_text(self.tools, is_parallel=self.is_parallel) if self.tools else ""

    def grammar(self) -> str | None:
        """What the model's text must match, in llguidance's Lark syntax; None if anything may be written."""
        callable_tools = [tool for tool in self.tools if tool.name in self.names]
        if not callable_tools:
            return None
        numbers = range(len(callable_tools))
        more = ""
        if self.is_parallel:
            more = f" (GAP ({_any('call', numbers)}))* GAP?"
        rules = [f"GAP: /{_GAP}/"] if self.is_parallel else []
        if self.is_required:
            rules.insert(0, f"start: ({_any('call', numbers)}){more}")
        else:
            names = "|".join(sorted(self.names))
            rules[:0] = [
                f"start: TEXT | ({_any('begun', numbers)}){more}",
                f'TEXT: /(?s:.*)/ & ~/(?s:.*){CALL_HEAD}({names})"(?s:.*)/',
            ]
        for number, tool in enumerate(callable_tools):
            head = f'{CALL_HEAD}{tool.name}"'
            if not self.is_required:
                # Lazy: the text ends with the first beginning of a call.
                rules.append(f"begun_{number}: head_{number} rest_{number}")
                rules.append(f"head_{number}[lazy]: /(?s:.*){head}/")
            if self.is_required or self.is_parallel:
                rules.append(f"call_{number}: /{head}/ rest_{number}")
            rules.append(f"rest_{number}: /{_ARGUMENTS_HEAD}/ arguments_{number} /{_CALL_END}/")
            rules.append(f"arguments_{number}: %json {json.dumps(_arguments_schema(tool.parameters))}")
        return "\n".join(rules)


def check_parameters(tool: Tool, *, is_strict: bool) -> bool:
    """Whether arguments can be held to all that `tool.parameters` says, and not to a part alone.

    Takes milliseconds, for which other threads go on. Raises SchemaError, if `is_strict` for such a part, too.
    """
    if tool.parameters.get("type", "object") != "object":
        raise SchemaError("must be a schema of type 'object'")
    schema = json.dumps(_arguments_schema(tool.parameters))
    if len(schema) > MAX_SCHEMA_CHARS:
        raise SchemaError(f"must be at most {MAX_SCHEMA_CHARS} characters of JSON, not {len(schema)}")
    failed, problems = _compile(schema)
    if failed:
        raise SchemaError(f"is not a schema that arguments can be held to: {problems}")
    if problems and is_strict:
        raise SchemaError(f"has parts that cannot be enforced as 'strict' asks: {problems}")
    return not problems


def total_schema_chars(tools: Iterable[Tool]) -> int:
    return sum(len(json.dumps(tool.parameters)) for tool in tools)


def _any(rule: str, numbers: Iterable[int]) -> str:
    return " | ".join(f"{rule}_{number}" for number in numbers)


def _arguments_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema that arguments are held to: that of the tool, without arguments that it does not name."""
    schema = {"type": "object", **parameters}
    if not _COMBINING_KEYS & schema.keys():
        # An invented argument would be valid, and of no use to anybody.
        schema.setdefault("additionalProperties", not ("properties" in schema or not parameters))
    schema["x-guidance"] = {"lenient": True, "whitespace_pattern": _JSON_SPACE}
    return schema


@functools.lru_cache(maxsize=256)
def _compile(schema: str) -> tuple[bool, str]:
    """Whether there is a grammar for a schema, and what the compiler says of it. An agent sends the same ones
    with every turn."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(f"start: arguments\narguments: %json {schema}")
    # Of an error, the part between its place in our grammar and a copy of that.
    lines = [message.removeprefix("at 2(12): ").partition("\n")[0] for message in messages]
    return failed, "; ".join(line.removeprefix("failed to compile JSON schema: ") for line in lines)
