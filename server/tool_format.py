"""How tools, their calls and their results look in a conversation with Gemma 1 to 3.

These models have no tokens for tools. Google documents a JSON form for them ("Function calling with Gemma",
ai.google.dev), which is text like all else: the schemas stand in a user turn, a call is a line of a model turn,
and a result is text of the user turn that follows.

    {"name": "get_weather", "parameters": {"city": "Paris"}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    """Of letters, digits, `_` and `-`."""
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The JSON schema of the arguments, as the client wrote it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON, exactly as the model wrote it."""


def declarations_text(tools: Sequence[Tool], *, is_parallel: bool) -> str:
    """What tells the model which tools there are. `is_parallel`: whether it may call several at once."""
    several = "To invoke several functions, put each on a line of its own. " if is_parallel else ""
    lines = [
        "You have access to functions. If you decide to invoke a function, you MUST put it in the format of",
        '{"name": function name, "parameters": dictionary of argument name and its value}',
        f"{several}You SHOULD NOT include any other text in the response if you call a function.",
        "",
        *(_declaration(tool) for tool in tools),
    ]
    return "\n".join(lines)


def call_text(call: ToolCall) -> str:
    """A call as the model writes it. Unparsed, since a model can only be reminded of what it wrote."""
    return f'{{"name": {json.dumps(call.name)}, "parameters": {call.arguments.strip() or "{}"}}}'


def result_text(name: str, text: str, *, number: int, total: int) -> str:
    """The result of call `number` (from 1) of the `total` that one turn made."""
    which = f" (call {number} of {total})" if total > 1 else ""
    return f"Result of {name}{which}:\n{text.strip()}"


def _declaration(tool: Tool) -> str:
    described = {"description": tool.description} if tool.description else {}
    return json.dumps({"name": tool.name, **described, "parameters": tool.parameters}, ensure_ascii=False)
