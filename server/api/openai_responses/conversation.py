"""From a request of the Responses API to what the template renders and a turn is planned with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from server.api.formats import ResponseFormat
from server.api.openai_responses.protocol import LOGPROBS, InputContent, InputItem, ResponsesRequest
from server.api.tools import DeclaredTool
from server.chat_template import ChatMessage, join_text_parts
from server.errors import InvalidRequestError, shown
from server.tool_format import Tool, ToolCall

Value = TypeVar("Value")


def check_stateless(body: ResponsesRequest) -> list[str]:
    """The fields that have no effect here. Raises InvalidRequestError for those that need a memory."""
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise InvalidRequestError(
                f"'{name}' cannot be used: responses are not kept. Send the whole conversation as 'input'.",
                param=name,
                code="unsupported_parameter",
            )
    for name in ("background", "prompt"):
        if getattr(body, name):
            raise InvalidRequestError(
                f"'{name}' is not supported: this server keeps nothing between requests.",
                param=name,
                code="unsupported_parameter",
            )
    without_effect = {
        "store": body.store,
        "truncation": body.truncation == "auto",
        "include": any(wanted != LOGPROBS for wanted in body.include or ()),
    }
    return [name for name, is_set in without_effect.items() if is_set]


def conversation(body: ResponsesRequest) -> list[ChatMessage]:
    """Raises InvalidRequestError."""
    messages = [ChatMessage("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, ChatMessage("user", body.input)]
    called: set[str] = set()
    calls: dict[str, ToolCall] = {}  # of the last message, which is the assistant's
    for index, item in enumerate(body.input):
        param = f"input[{index}]"
        match item.type:
            case "message":
                _close(messages, calls)
                role = _needed(item.role, f"{param}.role")
                messages.append(ChatMessage(role, _text(item.content, f"{param}.content")))
            case "function_call":
                call = _call(item, param)
                called.add(call.id)
                if not messages or messages[-1].role != "assistant":
                    messages.append(ChatMessage("assistant", ""))
                _add_call(calls, call, param)
            case "function_call_output":
                _close(messages, calls)
                call_id = _needed(item.call_id, f"{param}.call_id")
                if call_id not in called:
                    raise InvalidRequestError(
                        f"'{param}.call_id' is {shown(call_id)}, but no item before it is a function_call "
                        "of that call_id; send it, too.",
                        param=f"{param}.call_id",
                    )
                text = _text(item.output, f"{param}.output")
                messages.append(ChatMessage("tool", text, call_id=call_id))
    _close(messages, calls)
    return messages


def declared_tools(body: ResponsesRequest) -> list[DeclaredTool]:
    return [
        DeclaredTool(
            Tool(tool.name, tool.description or "", tool.parameters or {}),
            is_strict=bool(tool.strict),
            name_param=f"tools[{index}].name",
            parameters_param=f"tools[{index}].parameters",
        )
        for index, tool in enumerate(body.tools or ())
    ]


def response_format(body: ResponsesRequest) -> ResponseFormat | None:
    """`text.format` as chat completions call it. Raises InvalidRequestError."""
    wanted = body.text.format if body.text is not None else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return ResponseFormat.model_validate({"type": wanted.type})
    schema = _needed(wanted.json_schema, "text.format.schema")
    return ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"schema": schema}})


def _call(item: InputItem, param: str) -> ToolCall:
    return ToolCall(
        _needed(item.call_id, f"{param}.call_id"),
        _needed(item.name, f"{param}.name"),
        _needed(item.arguments, f"{param}.arguments"),
    )


def _add_call(calls: dict[str, ToolCall], call: ToolCall, param: str) -> None:
    if call.id in calls:
        raise InvalidRequestError(
            f"'{param}.call_id' is {shown(call.id)}, as that of a call before it; ids must be unique.",
            param=f"{param}.call_id",
        )
    calls[call.id] = call


def _close(messages: list[ChatMessage], calls: dict[str, ToolCall]) -> None:
    """Calls that follow one another, or a message of the assistant, are of one turn, which ends here."""
    if calls:
        messages[-1] = dataclasses.replace(messages[-1], calls=tuple(calls.values()))
        calls.clear()


def _text(content: str | Sequence[InputContent] | None, param: str) -> str:
    if content is None:
        raise _missing(param)
    return content if isinstance(content, str) else join_text_parts(part.text for part in content)


def _needed(value: Value | None, param: str) -> Value:
    if value is None:
        raise _missing(param)
    return value


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' is required.", param=param, code="missing_required_parameter")
