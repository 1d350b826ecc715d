"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server.api import logprobs
from server.api.constraints import output_constraints
from server.api.openapi import body_of
from server.api.params import chat_logprobs, check_stream_options, choices_of_prompt
from server.api.prompts import chat_token_ids
from server.api.protocol import ChatCompletionRequest
from server.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Head,
    Usage,
)
from server.api.serving import admit, answer, read_body, runtime_of, served_model, stream
from server.engine.types import TokenLogprob
from server.frontend.admission import check_token_ids, resolve_max_tokens
from server.frontend.generation import ChoiceDelta, ChoiceRequest, Generation
from server.tokenizer import Tokenizer

router = APIRouter()


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
    wanted_logprobs = chat_logprobs(body, runtime.config.max_logprobs)
    prompt = await chat_token_ids(body.messages, model)
    by_new_name = body.max_completion_tokens is not None
    max_tokens = resolve_max_tokens(
        len(prompt),
        body.max_completion_tokens if by_new_name else body.max_tokens,
        model.info,
        param="messages",
        max_tokens_param="max_completion_tokens" if by_new_name else "max_tokens",
    )
    check_token_ids(prompt, model.info, "messages")
    constraints = await output_constraints(body, model, runtime.grammars)
    choices = [
        ChoiceRequest(0, prompt, params.sampling, params.stop)
        for params in choices_of_prompt(
            body, model, max_tokens=max_tokens, logprobs=wanted_logprobs, constraints=constraints
        )
    ]
    generation = admit(request, model, choices, body.cache_salt)
    head = Head.new("chatcmpl", model.names[0])
    if body.stream:
        return stream(request, generation, _chunks(generation, head, body, model.tokenizer), headers)
    return await answer(request, generation, _whole(generation, head, len(choices), model.tokenizer), headers)


async def _whole(generation: Generation, head: Head, num_choices: int, tokenizer: Tokenizer) -> ChatCompletion:
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    tokens: list[list[TokenLogprob] | None] = [None] * num_choices
    last: dict[int, ChoiceDelta] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            texts[delta.index].append(delta.text.text)
            if delta.text.logprobs is not None:
                tokens[delta.index] = (tokens[delta.index] or []) + delta.text.logprobs
            last[delta.index] = delta
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage("".join(texts[index])),
            logprobs=_logprobs(tokens[index], tokenizer),
            finish_reason=last[index].text.finish_reason or "",
            stop_reason=last[index].text.stop_reason,
        )
        for index in range(num_choices)
    ]
    return ChatCompletion(head.id, head.created, head.model, choices, Usage.of(generation.usage()))


async def _chunks(
    generation: Generation, head: Head, body: ChatCompletionRequest, tokenizer: Tokenizer
) -> AsyncGenerator[ChatCompletionChunk, None]:
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    continuous = options is not None and options.continuous_usage_stats

    def chunk(choice: ChatChunkChoice) -> ChatCompletionChunk:
        usage = Usage.of(generation.usage()) if continuous else (None if with_usage else UNSET)
        return ChatCompletionChunk(head.id, head.created, head.model, [choice], usage)

    begun: set[int] = set()
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in begun:
                begun.add(delta.index)
                yield chunk(ChatChunkChoice(delta.index, ChatDelta(role="assistant", content="")))
            text = delta.text
            if text.text or text.logprobs or text.finish_reason is not None:
                is_last = text.finish_reason is not None
                yield chunk(
                    ChatChunkChoice(
                        index=delta.index,
                        delta=ChatDelta(content=text.text) if text.text else ChatDelta(),
                        logprobs=_logprobs(text.logprobs, tokenizer),
                        finish_reason=text.finish_reason,
                        stop_reason=text.stop_reason if is_last else UNSET,
                    )
                )
    if with_usage:
        yield ChatCompletionChunk(head.id, head.created, head.model, [], Usage.of(generation.usage()))


def _logprobs(tokens: list[TokenLogprob] | None, tokenizer: Tokenizer) -> ChatLogprobs | None:
    return None if tokens is None else logprobs.chat_logprobs(tokens, tokenizer)
