"""The Messages API's answers: whole, and as the events of a stream."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from sse_starlette import ServerSentEvent

from server.api.error_responses import anthropic_body
from server.api.sse import EventFormat, named_event
from server.engine.types import FinishReason
from server.frontend.records import UsageCounts
from server.frontend.tool_parser import ArgumentPiece, CallBegun, TextPiece
from server.frontend.turn import TOOL_CALLS, Turn

_TOOL_USE_ID = "toolu_{}"


class TextContent(Struct, tag_field="type", tag="text"):
    text: str


class ToolUseContent(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: msgspec.Raw


class MessageUsage(Struct):
    input_tokens: int
    """Of the prompt, those that the cache did not have."""
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0

    @classmethod
    def of(cls, counts: UsageCounts) -> MessageUsage:
        return cls(
            input_tokens=counts.prompt_tokens - counts.cached_tokens,
            output_tokens=counts.completion_tokens,
            cache_read_input_tokens=counts.cached_tokens,
        )


class MessageAnswer(Struct):
    id: str
    model: str
    content: list[TextContent | ToolUseContent]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class TokenCount(Struct):
    input_tokens: int


class MessageDelta(Struct):
    """What a block gained, or how the message ended."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(Struct):
    """One event of a stream; the type tells which of the others there are."""

    type: str
    message: MessageAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: TextContent | ToolUseContent | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


def _event(event: object) -> bytes:
    assert isinstance(event, MessageEvent)
    return named_event(event.type, event)


EVENTS = EventFormat(
    event=_event,
    error=lambda error: named_event("error", anthropic_body(error)),
    end=b"",
    ping=lambda: ServerSentEvent(event="ping", data='{"type": "ping"}', sep="\n"),
)


def new_message_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


async def whole(turn: Turn, message_id: str, model: str, max_tokens: int) -> MessageAnswer:
    (choice,) = await turn.whole()
    content: list[TextContent | ToolUseContent] = [TextContent(choice.text)] if choice.text else []
    content += [
        ToolUseContent(_TOOL_USE_ID.format(call.id), call.name, _input(call.arguments)) for call in choice.calls
    ]
    end = _end(choice.finish_reason, choice.stop_reason, turn, max_tokens)
    return MessageAnswer(message_id, model, content, *end, MessageUsage.of(turn.usage()))


async def events(
    turn: Turn, message_id: str, model: str, max_tokens: int
) -> AsyncGenerator[MessageEvent, None]:
    """`max_tokens`: as asked for."""
    blocks = _Blocks()
    begun = False
    async with aclosing(turn.deltas()) as deltas:
        async for delta in deltas:
            if not begun:
                begun = True
                usage = MessageUsage.of(turn.usage())
                message = MessageAnswer(message_id, model, [], None, None, usage)
                yield MessageEvent("message_start", message=message)
                yield MessageEvent("ping")
            for piece in delta.pieces:
                for event in blocks.events(piece):
                    yield event
            if delta.finish_reason is not None:
                for event in blocks.stop():
                    yield event
                reason, sequence = _end(delta.finish_reason, delta.stop_reason, turn, max_tokens)
                end = MessageDelta(stop_reason=reason, stop_sequence=sequence)
                yield MessageEvent("message_delta", delta=end, usage=MessageUsage.of(turn.usage()))
    yield MessageEvent("message_stop")


class _Blocks:
    """Which block of the content is open."""

    def __init__(self) -> None:
        self._index = -1
        self._is_text = False
        self._is_open = False

    def events(self, piece: TextPiece | CallBegun | ArgumentPiece) -> list[MessageEvent]:
        match piece:
            case TextPiece(text):
                opened = [] if self._is_open and self._is_text else self._start(TextContent(""))
                return [*opened, self._delta(MessageDelta("text_delta", text=text))]
            case CallBegun(_, call_id, name):
                return self._start(ToolUseContent(_TOOL_USE_ID.format(call_id), name, msgspec.Raw(b"{}")))
            case ArgumentPiece(_, text):
                return [self._delta(MessageDelta("input_json_delta", partial_json=text))]

    def stop(self) -> list[MessageEvent]:
        if not self._is_open:
            return []
        self._is_open = False
        return [MessageEvent("content_block_stop", index=self._index)]

    def _start(self, block: TextContent | ToolUseContent) -> list[MessageEvent]:
        stopped = self.stop()
        self._index += 1
        self._is_open, self._is_text = True, isinstance(block, TextContent)
        return [*stopped, MessageEvent("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: MessageDelta) -> MessageEvent:
        return MessageEvent("content_block_delta", index=self._index, delta=delta)


def _end(
    finish_reason: str, stop_reason: str | int | None, turn: Turn, max_tokens: int
) -> tuple[str, str | None]:
    """`stop_reason` and `stop_sequence`."""
    if finish_reason == TOOL_CALLS:
        return "tool_use", None
    if finish_reason == FinishReason.LENGTH:
        # Anthropic's name for the case that fewer tokens fitted than were asked for.
        is_full = turn.max_tokens < max_tokens
        return ("model_context_window_exceeded" if is_full else "max_tokens"), None
    if isinstance(stop_reason, str):
        return "stop_sequence", stop_reason
    return "end_turn", None


def _input(arguments: str) -> msgspec.Raw:
    """Arguments as they are; those that the token limit cut off are no JSON, and stand as an empty object."""
    try:
        msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.Raw(b"{}")
    return msgspec.Raw(arguments.encode())
