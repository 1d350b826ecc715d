"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server.api import ignored_fields, logprobs
from server.api.chat_messages import chat_messages
from server.api.openapi import body_of
from server.api.params import chat_logprobs, check_stream_options
from server.api.protocol import ChatCompletionRequest, declared_tools
from server.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatToolCall,
    FunctionCallPart,
    Head,
    Usage,
)
from server.api.serving import answer, read_body, runtime_of, served_model, stream
from server.api.tool_plans import plan_tools
from server.api.turns import begin_turn
from server.engine.types import TokenLogprob
from server.frontend.tool_parser import ArgumentPiece, CallBegun, Piece, TextPiece
from server.frontend.turn import Turn, TurnChoice
from server.tokenizer import Tokenizer

router = APIRouter()

_CALL_ID = "call_{}"


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation",
    openapi_extra=body_of(ChatCompletionRequest, answer=ChatCompletion, stream=ChatCompletionChunk),
)
async def create_chat_completion(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, ChatCompletionRequest)
    model = served_model(runtime, body.model)
    check_stream_options(body)
    messages = chat_messages(body.messages)
    tools, loose = await plan_tools(
        declared_tools(body.tools),
        body.tool_choice,
        runtime.grammars,
        is_parallel=body.parallel_tool_calls is not False,
    )
    ignored_fields.add_to_header(headers, loose)
    by_new_name = body.max_completion_tokens is not None
    turn = await begin_turn(
        request,
        model,
        messages,
        body,
        tools=tools,
        max_tokens=body.max_completion_tokens if by_new_name else body.max_tokens,
        max_tokens_param="max_completion_tokens" if by_new_name else "max_tokens",
        logprobs=chat_logprobs(body, runtime.config.max_logprobs),
    )
    head = Head.new("chatcmpl", model.names[0])
    if body.stream:
        return stream(request, turn.generation, _chunks(turn, head, body, model.tokenizer), headers)
    return await answer(request, turn.generation, _whole(turn, head, model.tokenizer), headers)


async def _whole(turn: Turn, head: Head, tokenizer: Tokenizer) -> ChatCompletion:
    choices = [
        ChatChoice(
            index=index,
            message=_message(choice),
            logprobs=_logprobs(choice.logprobs, tokenizer),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        for index, choice in enumerate(await turn.whole())
    ]
    return ChatCompletion(head.id, head.created, head.model, choices, Usage.of(turn.usage()))


def _message(choice: TurnChoice) -> AssistantMessage:
    if not choice.calls:
        return AssistantMessage(choice.text)
    calls = [
        ChatToolCall(FunctionCallPart(call.arguments, call.name), _CALL_ID.format(call.id), "function")
        for call in choice.calls
    ]
    return AssistantMessage(choice.text or None, tool_calls=calls)


async def _chunks(
    turn: Turn, head: Head, body: ChatCompletionRequest, tokenizer: Tokenizer
) -> AsyncGenerator[ChatCompletionChunk, None]:
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    continuous = options is not None and options.continuous_usage_stats

    def chunk(choice: ChatChunkChoice) -> ChatCompletionChunk:
        usage = Usage.of(turn.usage()) if continuous else (None if with_usage else UNSET)
        return ChatCompletionChunk(head.id, head.created, head.model, [choice], usage)

    begun: set[int] = set()
    async with aclosing(turn.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in begun:
                begun.add(delta.index)
                yield chunk(ChatChunkChoice(delta.index, ChatDelta(role="assistant", content="")))
            parts = _parts(delta.pieces)
            if not parts and (delta.logprobs or delta.finish_reason is not None):
                parts = [ChatDelta()]
            for number, part in enumerate(parts, start=1):
                choice = ChatChunkChoice(delta.index, part)
                if number == 1:
                    choice.logprobs = _logprobs(delta.logprobs, tokenizer)
                if number == len(parts) and delta.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
                yield chunk(choice)
    if with_usage:
        yield ChatCompletionChunk(head.id, head.created, head.model, [], Usage.of(turn.usage()))


def _parts(pieces: Iterable[Piece]) -> list[ChatDelta]:
    """One delta for each piece: clients look at the first call of a delta alone."""
    parts = []
    for piece in pieces:
        match piece:
            case TextPiece(text):
                parts.append(ChatDelta(content=text))
            case CallBegun(call_index, call_id, name):
                part = FunctionCallPart("", name)
                begun = ChatToolCall(part, _CALL_ID.format(call_id), "function", call_index)
                parts.append(ChatDelta(tool_calls=[begun]))
            case ArgumentPiece(call_index, text):
                gained = ChatToolCall(FunctionCallPart(text), index=call_index)
                parts.append(ChatDelta(tool_calls=[gained]))
    return parts


def _logprobs(tokens: list[TokenLogprob] | None, tokenizer: Tokenizer) -> ChatLogprobs | None:
    return None if tokens is None else logprobs.chat_logprobs(tokens, tokenizer)
