"""The grammar of a turn with calls in the JSON form, of which every call that begins is one.

A call begins where `{"name": "NAME"` is complete, NAME being a tool that may be called. The text before it is
free, but for that beginning: other JSON is text. What follows it is constrained.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from server.grammar_library import JSON_WHITESPACE
from server.tool_format import Tool

Instead = Literal["TEXT", "@answer"] | None
"""What may be written instead of calls: free text, or what the grammar named `answer` allows; None: nothing."""
CALL_HEAD = r'\{[ \t\r\n]{0,16}"name"[ \t\r\n]{0,4}:[ \t\r\n]{0,4}"'
"""A regular expression, to Python as to the grammar: a call up to its name."""

_CALL_HEAD_PARTS = '"{" WIDE? "\\"name\\"" NARROW? ":" NARROW?'
_SPACE_RULES = "WIDE: /[ \\t\\r\\n]{1,16}/\nNARROW: /[ \\t\\r\\n]{1,4}/"
"""CALL_HEAD in pieces: as one it would outbid the bracket of an answer in JSON, as longer pieces do."""

_ARGUMENTS_HEAD = r',[ \t\r\n]{0,16}"parameters"[ \t\r\n]{0,4}:[ \t\r\n]{0,4}'
_CALL_END = r"[ \t\r\n]{0,16}\}"
_GAP = r"[ ,\]\r\n]{0,8}(```[a-z_]{0,16}[ \[\r\n]{0,8}){0,2}"
"""Between calls and after them: models fence calls, or make a list of them."""
_COMBINING_KEYS = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties", "dependentSchemas"}
)


def turn_grammar(tools: Sequence[Tool], loose: Collection[str], *, is_parallel: bool, instead: Instead) -> str:
    """What a turn with calls of `tools` must match, in llguidance's Lark.

    `loose`: names of tools whose arguments are held to what a grammar can express of their schemas.
    `is_parallel`: whether several may be called.
    """
    numbers = range(len(tools))
    more = f" (GAP ({_any('call', numbers)}))* GAP?" if is_parallel else ""
    first, rules = "call", [_SPACE_RULES]
    if is_parallel:
        rules.append(f"GAP: /{_GAP}/")
    if instead == "TEXT":
        first = "begun"
        names = "|".join(sorted(tool.name for tool in tools))
        rules.append(f'TEXT: /(?s:.*)/ & ~/(?s:.*){CALL_HEAD}({names})"(?s:.*)/')
    alternative = f"{instead} | " if instead is not None else ""
    for number, tool in enumerate(tools):
        if first == "begun":
            # Lazy: the text ends with the first beginning of a call.
            rules.append(f"begun_{number}: head_{number} rest_{number}")
            rules.append(f'head_{number}[lazy]: /(?s:.*){CALL_HEAD}{tool.name}"/')
        if first == "call" or is_parallel:
            rules.append(f'call_{number}: {_CALL_HEAD_PARTS} "\\"{tool.name}\\"" rest_{number}')
        schema = json.dumps(_arguments_schema(tool.parameters, tool.name in loose))
        rules.append(f"rest_{number}: /{_ARGUMENTS_HEAD}/ arguments_{number} /{_CALL_END}/")
        rules.append(f"arguments_{number}: %json {schema}")
    return "\n".join([f"start: {alternative}({_any(first, numbers)}){more}", *rules])


def arguments_grammar(parameters: dict[str, Any], *, is_loose: bool) -> str:
    """Of a call's arguments alone. `is_loose`: but for what no grammar can express."""
    return f"start: arguments\narguments: %json {json.dumps(_arguments_schema(parameters, is_loose))}"


def _any(rule: str, numbers: Iterable[int]) -> str:
    return " | ".join(f"{rule}_{number}" for number in numbers)


def _arguments_schema(parameters: dict[str, Any], is_loose: bool) -> dict[str, Any]:
    """The schema that arguments are held to: that of the tool, without arguments that it does not name."""
    schema = {"type": "object", **parameters}
    if not _COMBINING_KEYS & schema.keys():
        # An invented argument would be valid, and of no use to anybody.
        schema.setdefault("additionalProperties", not ("properties" in schema or not parameters))
    schema["x-guidance"] = {"lenient": is_loose, "whitespace_pattern": JSON_WHITESPACE}
    return schema
