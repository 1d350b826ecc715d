"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from server.api import logprobs
from server.api.body import off_loop
from server.api.chat_messages import chat_messages
from server.api.openapi import body_of
from server.api.params import chat_logprobs, check_stream_options
from server.api.protocol import ChatCompletionRequest
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
    PromptLogprobs,
    Usage,
)
from server.api.serving import ChunkUsage, answer, read_body, runtime_of, served_model, stream
from server.api.terms import ENTERING
from server.api.tool_plans import plan_chat_tools
from server.api.turns import begin_turn
from server.engine.types import PromptTokenLogprob, TokenLogprob
from server.frontend.tool_parser import ArgumentPiece, CallBegun, Piece, TextPiece
from server.frontend.turn import Turn, TurnChoice
from server.tokenizer import Tokenizer

router = APIRouter()

_CALL_ID = "call_{}"


@router.post(
    "/v1/chat/completions",
    dependencies=[ENTERING],
    summary="Continue a conversation",
    openapi_extra=body_of(ChatCompletionRequest, answer=ChatCompletion, stream=ChatCompletionChunk),
)
async def create_chat_completion(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, ChatCompletionRequest)
    model = served_model(runtime, body.model)
    check_stream_options(body)
    messages = await off_loop(request, lambda: chat_messages(body.messages))
    tools = await plan_chat_tools(body, model, runtime.grammars, headers)
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
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    last = messages[-1]
    # As the template has it, which trims texts.
    echo = last.text.strip() if body.echo and last.role == "assistant" else ""
    writer = _Writer(body, turn, model.tokenizer, echo)
    head = Head.new("chatcmpl", model.names[0])
    if body.stream:
        return stream(request, turn.generation, _chunks(turn, head, body, writer), headers)
    return await answer(request, turn.generation, _whole(turn, head, writer), headers)


class _Writer:
    """Makes the parts of an answer that were asked for."""

    def __init__(self, body: ChatCompletionRequest, turn: Turn, tokenizer: Tokenizer, echo: str) -> None:
        """`echo`: what every choice's text begins with."""
        self._body = body
        self._tokenizer = tokenizer
        self._names = logprobs.token_names(tokenizer, as_ids=body.return_tokens_as_token_ids)
        self.prompt_token_ids = turn.prompt_token_ids if body.return_token_ids else UNSET
        self.echo = echo

    def message(self, choice: TurnChoice) -> AssistantMessage:
        text = self.echo + choice.text
        if not choice.calls:
            return AssistantMessage(text)
        calls = [
            ChatToolCall(FunctionCallPart(call.arguments, call.name), _CALL_ID.format(call.id), "function")
            for call in choice.calls
        ]
        return AssistantMessage(text or None, tool_calls=calls)

    def logprobs(self, tokens: list[TokenLogprob] | None) -> ChatLogprobs | None:
        return None if tokens is None else logprobs.chat_logprobs(tokens, self._tokenizer, self._names)

    def token_ids(self, generated: list[int]) -> list[int] | UnsetType:
        return generated if self._body.return_token_ids else UNSET

    async def prompt_logprobs(
        self, entries: list[PromptTokenLogprob | None] | None
    ) -> PromptLogprobs | UnsetType:
        if self._body.prompt_logprobs is None or entries is None:
            return UNSET
        return await logprobs.prompt_logprobs(entries, self._body.prompt_logprobs, self._tokenizer)


async def _whole(turn: Turn, head: Head, writer: _Writer) -> ChatCompletion:
    whole = await turn.whole()

    def write() -> list[ChatChoice]:
        return [
            ChatChoice(
                index=index,
                message=writer.message(choice),
                logprobs=writer.logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                token_ids=writer.token_ids(choice.token_ids),
            )
            for index, choice in enumerate(whole)
        ]

    num_logprobs = sum(1 + len(token.top) for choice in whole for token in choice.logprobs or ())
    choices = await logprobs.written(num_logprobs, 0, write)
    return ChatCompletion(
        head.id,
        head.created,
        head.model,
        choices,
        Usage.of(turn.usage()),
        prompt_logprobs=await writer.prompt_logprobs(whole[0].prompt_logprobs),
        prompt_token_ids=writer.prompt_token_ids,
    )


async def _chunks(
    turn: Turn, head: Head, body: ChatCompletionRequest, writer: _Writer
) -> AsyncGenerator[ChatCompletionChunk, None]:
    usage = ChunkUsage(body.stream_options, lambda: Usage.of(turn.usage()))

    def chunk(choice: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(head.id, head.created, head.model, [choice], usage.of_chunk())

    begun: set[int] = set()
    async with aclosing(turn.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in begun:
                first = chunk(ChatChunkChoice(delta.index, ChatDelta(role="assistant", content="")))
                if not begun:
                    first.prompt_token_ids = writer.prompt_token_ids
                begun.add(delta.index)
                yield first
                if writer.echo:
                    yield chunk(ChatChunkChoice(delta.index, ChatDelta(content=writer.echo)))
            parts = _parts(delta.pieces)
            token_ids = writer.token_ids(delta.token_ids)
            if not parts and (delta.logprobs or token_ids or delta.finish_reason is not None):
                parts = [ChatDelta()]
            for number, part in enumerate(parts, start=1):
                choice = ChatChunkChoice(delta.index, part)
                if number == 1:
                    choice.logprobs, choice.token_ids = writer.logprobs(delta.logprobs), token_ids
                if number == len(parts) and delta.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
                yield chunk(choice)
    if usage.has_last_chunk:
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
