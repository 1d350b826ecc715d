"""`tools` and what belongs to it, in every dialect: from the fields of a request to a plan for its turn."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from server.errors import InvalidRequestError, shown
from server.frontend.tool_grammar import (
    MAX_SCHEMAS_CHARS,
    SchemaError,
    ToolPlan,
    check_parameters,
    total_schema_chars,
)
from server.tool_format import Tool

MAX_TOOLS = 128
"""OpenAI's limit. Names may be as long as Anthropic's."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    """Of the tools that may be called; None: any."""


@dataclass(frozen=True, slots=True)
class DeclaredTool:
    """One of a request's tools, and where it stands there."""

    tool: Tool
    is_strict: bool
    name_param: str
    parameters_param: str


def _tool_choice(value: Any) -> ToolChoice | None:
    """OpenAI's forms: that of chat completions, which nests names in objects, and the flat one of responses."""
    match value:
        case None:
            return None
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function"}:
            return ToolChoice("required", (_chosen_name(value),))
        case {"type": "allowed_tools"}:
            allowed = value.get("allowed_tools", value)
            match allowed:
                case {"mode": "auto" | "required" as mode, "tools": [*tools]} if tools:
                    return ToolChoice(mode, tuple(_chosen_name(tool) for tool in tools))
    raise ValueError(
        f"must be {', '.join(map(repr, _MODES))}, or an object that names a function or allowed tools"
    )


def _chosen_name(value: Any) -> str:
    match value:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise ValueError("must name a function")


_FUNCTION_NAME = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(_MODES)},
                {
                    "type": "object",
                    "required": ["type", "function"],
                    "properties": {"type": {"const": "function"}, "function": _FUNCTION_NAME},
                },
                {
                    "type": "object",
                    "required": ["type", "allowed_tools"],
                    "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": {"type": "object"}},
                },
                {"type": "null"},
            ]
        }
    ),
]


async def plan_tools(
    declared: Sequence[DeclaredTool], choice: ToolChoice | None, *, is_parallel: bool
) -> tuple[ToolPlan, list[str]]:
    """The plan, and the fields that it cannot hold the model to entirely. Raises InvalidRequestError."""
    if not declared:
        if choice is not None and choice.mode != "none":
            raise InvalidRequestError("'tool_choice' needs 'tools'.", param="tool_choice")
        return ToolPlan(), []
    loose = await _check(declared)
    tools = {item.tool.name: item.tool for item in declared}
    choice = choice or ToolChoice("auto")
    for name in choice.names or ():
        if name not in tools:
            raise InvalidRequestError(
                f"'tool_choice' names {shown(name)}, which is none of 'tools'.", param="tool_choice"
            )
    if choice.mode == "none":
        return ToolPlan(), loose
    plan = ToolPlan(
        tools=tuple(tools.values()),
        names=frozenset(tools if choice.names is None else choice.names),
        is_required=choice.mode == "required",
        is_parallel=is_parallel,
    )
    return plan, loose


async def _check(declared: Sequence[DeclaredTool]) -> list[str]:
    """The fields with parts that cannot be enforced. Raises InvalidRequestError for what is no tool."""
    if len(declared) > MAX_TOOLS:
        raise InvalidRequestError(
            f"'tools' must hold at most {MAX_TOOLS} tools, got {len(declared)}.", param="tools"
        )
    seen: dict[str, DeclaredTool] = {}
    for item in declared:
        name = item.tool.name
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"'{item.name_param}' must be 1 to 128 letters, digits, '_' and '-', got {shown(name)}.",
                param=item.name_param,
            )
        if name in seen:
            raise InvalidRequestError(
                f"'{item.name_param}' is {shown(name)}, as '{seen[name].name_param}' is; names must be unique.",
                param=item.name_param,
            )
        seen[name] = item
    return await asyncio.to_thread(_check_schemas, declared)


def _check_schemas(declared: Sequence[DeclaredTool]) -> list[str]:
    total = total_schema_chars(item.tool for item in declared)
    if total > MAX_SCHEMAS_CHARS:
        raise InvalidRequestError(
            f"The parameters of 'tools' must be at most {MAX_SCHEMAS_CHARS} characters of JSON, got {total}.",
            param="tools",
        )
    loose = []
    for item in declared:
        try:
            if not check_parameters(item.tool, is_strict=item.is_strict):
                loose.append(item.parameters_param)
        except SchemaError as error:
            raise InvalidRequestError(
                f"'{item.parameters_param}' {error}.", param=item.parameters_param
            ) from None
    return loose
