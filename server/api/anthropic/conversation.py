"""From Anthropic's messages and tools to what the template renders and a turn is planned with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TypeVar

from server.api.anthropic.protocol import (
    ContentBlock,
    CountTokensRequest,
    ToolDefinition,
    ToolUse,
)
from server.api.tool_plans import plan_tools
from server.api.tools import DeclaredTool, ToolChoice
from server.chat_template import ChatMessage, join_text_parts
from server.errors import InvalidRequestError, shown
from server.frontend.grammar_check import GrammarChecker
from server.frontend.served_model import ServedModel
from server.frontend.tool_plan import ToolPlan
from server.tool_format import Tool, ToolCall

_PARAGRAPH = "\n\n"

Value = TypeVar("Value")


def conversation(body: CountTokensRequest) -> list[ChatMessage]:
    """Raises InvalidRequestError."""
    messages = list(_system(body))
    calls: set[str] = set()
    for index, message in enumerate(body.messages):
        param = f"messages[{index}]"
        if isinstance(message.content, str):
            messages.append(ChatMessage(message.role, message.content))
        elif message.role == "assistant":
            messages.append(_assistant_message(message.content, param))
            calls.update(call.id for call in messages[-1].calls)
        else:
            messages += _user_messages(message.content, param, calls)
    if body.messages[-1].role == "assistant":
        raise InvalidRequestError(
            "'messages' ends with an assistant's message: this server does not continue one. Let it end with a "
            "user's.",
            param=f"messages[{len(body.messages) - 1}]",
        )
    return messages


async def tool_plan(
    body: CountTokensRequest, model: ServedModel, grammars: GrammarChecker
) -> tuple[ToolPlan, list[str]]:
    """As `plan_tools`."""
    choice = body.tool_choice
    is_parallel = choice is None or not choice.disable_parallel_tool_use
    declared = [_declared(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    return await plan_tools(declared, _tool_choice(choice), model, grammars, is_parallel=is_parallel)


def _system(body: CountTokensRequest) -> Iterator[ChatMessage]:
    if isinstance(body.system, str):
        yield ChatMessage("system", body.system)
    else:
        yield from (ChatMessage("system", block.text) for block in body.system or ())


def _assistant_message(blocks: Sequence[ContentBlock], param: str) -> ChatMessage:
    texts: list[str] = []
    calls: dict[str, ToolCall] = {}
    for index, block in enumerate(blocks):
        where = f"{param}.content[{index}]"
        match block.type:
            case "text":
                texts.append(_needed(block.text, f"{where}.text"))
            case "tool_use":
                call_id = _needed(block.id, f"{where}.id")
                if call_id in calls:
                    raise InvalidRequestError(
                        f"'{where}.id' is {shown(call_id)}, as that of a block before it; ids must be unique.",
                        param=f"{where}.id",
                    )
                arguments = json.dumps(_needed(block.input, f"{where}.input"), ensure_ascii=False)
                calls[call_id] = ToolCall(call_id, _needed(block.name, f"{where}.name"), arguments)
            case "tool_result":
                raise _misplaced(block, where, "a user's")
    return ChatMessage("assistant", _PARAGRAPH.join(texts), tuple(calls.values()))


def _user_messages(blocks: Sequence[ContentBlock], param: str, calls: set[str]) -> Iterator[ChatMessage]:
    if not blocks:
        yield ChatMessage("user", "")
    for index, block in enumerate(blocks):
        where = f"{param}.content[{index}]"
        match block.type:
            case "text":
                yield ChatMessage("user", _needed(block.text, f"{where}.text"))
            case "tool_result":
                call_id = _needed(block.tool_use_id, f"{where}.tool_use_id")
                if call_id not in calls:
                    raise InvalidRequestError(
                        f"'{where}.tool_use_id' is {shown(call_id)}, but no message before it has a tool_use "
                        "of that id; send that message, too.",
                        param=f"{where}.tool_use_id",
                    )
                yield ChatMessage("tool", _result(block), call_id=call_id)
            case "tool_use":
                raise _misplaced(block, where, "an assistant's")


def _result(block: ContentBlock) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else join_text_parts(part.text for part in content)
    return f"Error: {text}" if block.is_error else text


def _declared(tool: ToolDefinition, param: str) -> DeclaredTool:
    return DeclaredTool(
        Tool(tool.name, tool.description or "", tool.input_schema),
        is_strict=bool(tool.strict),
        name_param=f"{param}.name",
        parameters_param=f"{param}.input_schema",
    )


def _tool_choice(choice: ToolUse | None) -> ToolChoice | None:
    match choice:
        case None:
            return None
        case ToolUse(type="tool"):
            return ToolChoice("required", (_needed(choice.name, "tool_choice.name"),))
        case ToolUse(type="any"):
            return ToolChoice("required")
        case ToolUse(type="none"):
            return ToolChoice("none")
    return ToolChoice("auto")


def _needed(value: Value | None, param: str) -> Value:
    if value is None:
        raise InvalidRequestError(f"'{param}' is required.", param=param, code="missing_required_parameter")
    return value


def _misplaced(block: ContentBlock, param: str, whose: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"'{param}' is a '{block.type}', which belongs to {whose} message.", param=f"{param}.type"
    )
