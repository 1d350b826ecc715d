"""A turn as a response, and as the events that build it up.

Laws:
1. Every item is added before it gains anything, and done before the next is added.
2. The events' `sequence_number`s count from 0 without a gap; the last event carries the whole response.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from server.api.logprobs import chat_logprobs
from server.api.openai_responses.answers import (
    IncompleteDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)
from server.api.responses import ChatTokenLogprob
from server.api.sse import EventFormat, comment_ping, named_event
from server.engine.types import FinishReason
from server.errors import ApiError
from server.frontend.tool_parser import ArgumentPiece, CallBegun, TextPiece
from server.frontend.turn import Turn, TurnDelta
from server.tokenizer import Tokenizer

IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


def _event(event: object) -> bytes:
    assert isinstance(event, ResponseEvent)
    return named_event(event.type, event)


def _error(error: ApiError) -> bytes:
    body = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return named_event("error", {**body, "sequence_number": 0})


EVENTS = EventFormat(event=_event, error=_error, end=b"", ping=comment_ping)
"""Its errors are those that nobody foresaw: others are told by the response."""


class ResponseWriter:
    """Writes one response, once: whole, or as events."""

    def __init__(self, turn: Turn, response: ResponseObject, tokenizer: Tokenizer) -> None:
        """`response`: as it is before anything was generated."""
        self._turn = turn
        self._response = response
        self._tokenizer = tokenizer
        self._num_events = 0
        self._item: OutputItem | None = None  # the one that gains
        self._parts: list[str] = []  # of its text or arguments
        self._logprobs: list[ChatTokenLogprob] = []  # of its text

    async def whole(self) -> ResponseObject:
        """Raises GenerationError, EngineUnavailableError."""
        async with aclosing(self._turn.deltas()) as deltas:
            async for delta in deltas:
                for _ in self._gain(delta):
                    pass
        return self._response

    async def events(self) -> AsyncGenerator[ResponseEvent, None]:
        yield self._told("response.created", response=self._response)
        yield self._told("response.in_progress", response=self._response)
        try:
            async with aclosing(self._turn.deltas()) as deltas:
                async for delta in deltas:
                    for event in self._gain(delta):
                        yield event
        except ApiError as error:
            self._end(FAILED, error=ResponseError("server_error", error.message))
        yield self._told(f"response.{self._response.status}", response=self._response)

    def _gain(self, delta: TurnDelta) -> Iterator[ResponseEvent]:
        logprobs = []
        if delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._tokenizer, self._tokenizer.token_text).content
        for piece in delta.pieces:
            if isinstance(piece, TextPiece):
                yield from self._gain_text(piece.text, logprobs)
                logprobs = []
            else:
                yield from self._gain_call(piece)
        if delta.finish_reason is None:
            return
        if delta.finish_reason == FinishReason.LENGTH:
            yield from self._finish_item(INCOMPLETE)
            self._end(INCOMPLETE, incomplete_details=IncompleteDetails("max_output_tokens"))
        else:
            yield from self._finish_item(COMPLETED)
            self._end(COMPLETED)

    def _gain_text(self, text: str, logprobs: list[ChatTokenLogprob]) -> Iterator[ResponseEvent]:
        if not isinstance(self._item, OutputMessage):
            yield from self._add_item(OutputMessage(f"msg_{uuid.uuid4().hex}", IN_PROGRESS, []))
            yield self._of_item("response.content_part.added", content_index=0, part=OutputText(""))
        self._parts.append(text)
        self._logprobs += logprobs
        yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _gain_call(self, piece: CallBegun | ArgumentPiece) -> Iterator[ResponseEvent]:
        match piece:
            case CallBegun(_, call_id, name):
                item = OutputCall(f"fc_{uuid.uuid4().hex}", f"call_{call_id}", name, "", IN_PROGRESS)
                yield from self._add_item(item)
            case ArgumentPiece(_, text):
                self._parts.append(text)
                yield self._of_item("response.function_call_arguments.delta", delta=text)

    def _add_item(self, item: OutputItem) -> Iterator[ResponseEvent]:
        yield from self._finish_item(COMPLETED)
        self._item, self._parts, self._logprobs = item, [], []
        yield self._told("response.output_item.added", output_index=len(self._response.output), item=item)

    def _finish_item(self, status: str) -> Iterator[ResponseEvent]:
        text = "".join(self._parts)
        done: OutputItem
        match self._item:
            case None:
                return
            case OutputMessage():
                part = OutputText(text, logprobs=self._logprobs)
                done = msgspec.structs.replace(self._item, status=status, content=[part])
                yield self._of_item(
                    "response.output_text.done", content_index=0, text=text, logprobs=self._logprobs
                )
                yield self._of_item("response.content_part.done", content_index=0, part=part)
            case OutputCall():
                done = msgspec.structs.replace(self._item, status=status, arguments=text)
                yield self._of_item(
                    "response.function_call_arguments.done", arguments=text, name=self._item.name
                )
        yield self._told("response.output_item.done", output_index=len(self._response.output), item=done)
        self._response = msgspec.structs.replace(self._response, output=[*self._response.output, done])
        self._item = None

    def _end(self, status: str, **fields: Any) -> None:
        usage = ResponseUsage.of(self._turn.usage())
        self._response = msgspec.structs.replace(self._response, status=status, usage=usage, **fields)

    def _of_item(self, kind: str, **fields: Any) -> ResponseEvent:
        assert self._item is not None
        index = len(self._response.output)
        return self._told(kind, item_id=self._item.id, output_index=index, **fields)

    def _told(self, kind: str, **fields: Any) -> ResponseEvent:
        event = ResponseEvent(type=kind, sequence_number=self._num_events, **fields)
        self._num_events += 1
        return event
