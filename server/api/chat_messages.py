"""A chat's messages from their wire form to what the template renders."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.protocol import Message, MessageToolCall
from server.chat_template import ChatMessage, join_text_parts
from server.errors import InvalidRequestError, shown
from server.tool_format import ToolCall


def chat_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """Raises InvalidRequestError for what no message of its role may have or lack."""
    return [_chat_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _chat_message(message: Message, param: str) -> ChatMessage:
    calls, call_id = message.tool_calls or [], message.tool_call_id
    if calls and message.role != "assistant":
        raise _misplaced(f"{param}.tool_calls", "an assistant", message.role)
    if call_id is not None and message.role != "tool":
        raise _misplaced(f"{param}.tool_call_id", "a tool", message.role)
    if call_id is None and message.role == "tool":
        raise _missing(f"{param}.tool_call_id")
    if message.content is None and not calls:
        raise _missing(f"{param}.content")
    return ChatMessage(message.role, _text(message), _calls(calls, f"{param}.tool_calls"), call_id or "")


def _text(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else join_text_parts(part.text for part in content)


def _calls(calls: Sequence[MessageToolCall], param: str) -> tuple[ToolCall, ...]:
    ids = set()
    for index, call in enumerate(calls):
        if call.id in ids:
            raise InvalidRequestError(
                f"'{param}[{index}].id' is {shown(call.id)}, as that of a call before it; ids must be unique.",
                param=f"{param}[{index}].id",
            )
        ids.add(call.id)
    return tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in calls)


def _misplaced(param: str, role: str, actual: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"'{param}' belongs to {role} message, not to one of role '{actual}'.", param=param
    )


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"'{param}' is required.", param=param, code="missing_required_parameter")
