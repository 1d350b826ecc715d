"""What a request says about tools, in whatever dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from server.tool_format import Tool

_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    """Of the tools that may be called; None: any."""

    @property
    def is_named(self) -> bool:
        """Whether it names the one function that is to be called."""
        return self.mode == "required" and self.names is not None and len(self.names) == 1


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
