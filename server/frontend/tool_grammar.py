"""Which tools a turn may call, and the grammar that its text must match so that every call is one.

A call begins where `{"name": "NAME"` is complete, NAME being a tool that may be called. The text before it is
free, but for that beginning: other JSON is text. What follows it is constrained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from server.grammar_library import JSON_WHITESPACE
from server.tool_format import Tool, declarations_text

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


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request says about tools; without any the model is told nothing, and writes free text."""

    tools: tuple[Tool, ...] = ()
    """That the model is told of."""
    names: frozenset[str] = frozenset()
    """Of those that it may call; not empty if `tools` is not."""
    loose: frozenset[str] = frozenset()
    """Names of those whose arguments are held to what a grammar can express of their schemas."""
    is_required: bool = False
    """Whether it must call one, and write nothing else."""
    is_parallel: bool = True
    """Whether it may call several."""

    @property
    def declarations(self) -> str:
        return declarations_text(self.tools, is_parallel=self.is_parallel) if self.tools else ""

    def grammar(self, answer: str | None = None) -> str:
        """What the model's text must match, as llguidance takes it; there must be tools.

        `answer`: a grammar of what may be written instead of calls; anything, if there is none.
        """
        tools = [tool for tool in self.tools if tool.name in self.names]
        numbers = range(len(tools))
        more = f" (GAP ({_any('call', numbers)}))* GAP?" if self.is_parallel else ""
        first, rules = "call", [_SPACE_RULES]
        if self.is_parallel:
            rules.append(f"GAP: /{_GAP}/")
        if self.is_required:
            start = f"({_any(first, numbers)}){more}"
        elif answer is not None:
            start = f"@answer | ({_any(first, numbers)}){more}"
        else:
            first = "begun"
            start = f"TEXT | ({_any(first, numbers)}){more}"
            names = "|".join(sorted(self.names))
            rules.append(f'TEXT: /(?s:.*)/ & ~/(?s:.*){CALL_HEAD}({names})"(?s:.*)/')
        for number, tool in enumerate(tools):
            if first == "begun":
                # Lazy: the text ends with the first beginning of a call.
                rules.append(f"begun_{number}: head_{number} rest_{number}")
                rules.append(f'head_{number}[lazy]: /(?s:.*){CALL_HEAD}{tool.name}"/')
            if first == "call" or self.is_parallel:
                rules.append(f'call_{number}: {_CALL_HEAD_PARTS} "\\"{tool.name}\\"" rest_{number}')
            schema = json.dumps(_arguments_schema(tool.parameters, tool.name in self.loose))
            rules.append(f"rest_{number}: /{_ARGUMENTS_HEAD}/ arguments_{number} /{_CALL_END}/")
            rules.append(f"arguments_{number}: %json {schema}")
        turn = "\n".join([f"start: {start}", *rules])
        if answer is None or self.is_required:
            return turn
        return json.dumps({"grammars": [{"name": "turn", "lark_grammar": turn}, *_named_answer(answer)]})


def _named_answer(grammar: str) -> list[dict[str, Any]]:
    """A grammar in either of llguidance's forms, as one of several."""
    if grammar.startswith("{"):
        first, *others = json.loads(grammar)["grammars"]
        return [{**first, "name": "answer"}, *others]
    return [{"name": "answer", "lark_grammar": grammar}]


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
