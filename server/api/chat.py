"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from server.api import logprobs
from server.api.openapi import body_of
from server.api.params import chat_logprobs, check_stream_options, choices_of_prompt
from server.api.prompts import chat_token_ids, truncated
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
    PromptLogprobs,
    Usage,
)
from server.api.serving import ChunkUsage, admit, answer, read_body, runtime_of, served_model, stream
from server.engine.types import PromptTokenLogprob, TokenLogprob
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
    by_new_name = body.max_completion_tokens is not None
    requested = body.max_completion_tokens if by_new_name else body.max_tokens
    rendered = await chat_token_ids(
        body.messages,
        model,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    prompt = truncated(rendered, body, model, requested)
    max_tokens = resolve_max_tokens(
        len(prompt),
        requested,
        model.info,
        param="messages",
        max_tokens_param="max_completion_tokens" if by_new_name else "max_tokens",
    )
    check_token_ids(prompt, model.info, "messages")
    choices = [
        ChoiceRequest(0, prompt, params.sampling, params.stop, body.skip_special_tokens is not False)
        for params in choices_of_prompt(
            body, model, max_tokens=max_tokens, logprobs=wanted_logprobs, count=body.n or 1
        )
    ]
    generation = admit(request, model, choices, body)
    writer = _Writer(body, prompt, model.tokenizer)
    head = Head.new("chatcmpl", model.names[0])
    if body.stream:
        return stream(request, generation, _chunks(generation, head, body, writer), headers)
    return await answer(request, generation, _whole(generation, head, len(choices), writer), headers)


class _Writer:
    """Makes the parts of an answer that were asked for."""

    def __init__(self, body: ChatCompletionRequest, prompt: list[int], tokenizer: Tokenizer) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._names = logprobs.token_names(tokenizer, as_ids=body.return_tokens_as_token_ids)
        self.prompt_token_ids = prompt if body.return_token_ids else UNSET
        last = body.messages[-1]
        # As the template has it, which trims texts.
        self.echo = last.text.strip() if body.echo and last.role == "assistant" else ""

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


async def _whole(generation: Generation, head: Head, num_choices: int, writer: _Writer) -> ChatCompletion:
    texts: list[list[str]] = [[writer.echo] for _ in range(num_choices)]
    tokens: list[list[TokenLogprob] | None] = [None] * num_choices
    generated: list[list[int]] = [[] for _ in range(num_choices)]
    last: dict[int, ChoiceDelta] = {}
    prompt_entries = None
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            texts[delta.index].append(delta.text.text)
            generated[delta.index] += delta.text.generated_token_ids
            prompt_entries = prompt_entries or delta.prompt_logprobs
            if delta.text.logprobs is not None:
                tokens[delta.index] = (tokens[delta.index] or []) + delta.text.logprobs
            last[delta.index] = delta
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage("".join(texts[index])),
            logprobs=writer.logprobs(tokens[index]),
            finish_reason=last[index].text.finish_reason or "",
            stop_reason=last[index].text.stop_reason,
            token_ids=writer.token_ids(generated[index]),
        )
        for index in range(num_choices)
    ]
    return ChatCompletion(
        head.id,
        head.created,
        head.model,
        choices,
        Usage.of(generation.usage()),
        prompt_logprobs=await writer.prompt_logprobs(prompt_entries),
        prompt_token_ids=writer.prompt_token_ids,
    )


async def _chunks(
    generation: Generation, head: Head, body: ChatCompletionRequest, writer: _Writer
) -> AsyncGenerator[ChatCompletionChunk, None]:
    usage = ChunkUsage(body.stream_options, lambda: Usage.of(generation.usage()))

    def chunk(choice: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(head.id, head.created, head.model, [choice], usage.of_chunk())

    begun: set[int] = set()
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in begun:
                first = chunk(ChatChunkChoice(delta.index, ChatDelta(role="assistant", content="")))
                if not begun:
                    first.prompt_token_ids = writer.prompt_token_ids
                begun.add(delta.index)
                yield first
                if writer.echo:
                    yield chunk(ChatChunkChoice(delta.index, ChatDelta(content=writer.echo)))
            text = delta.text
            token_ids = writer.token_ids(text.generated_token_ids)
            if text.text or text.logprobs or token_ids or text.finish_reason is not None:
                is_last = text.finish_reason is not None
                yield chunk(
                    ChatChunkChoice(
                        index=delta.index,
                        delta=ChatDelta(content=text.text) if text.text else ChatDelta(),
                        logprobs=writer.logprobs(text.logprobs),
                        finish_reason=text.finish_reason,
                        stop_reason=text.stop_reason if is_last else UNSET,
                        token_ids=token_ids,
                    )
                )
    if usage.has_last_chunk:
        yield ChatCompletionChunk(head.id, head.created, head.model, [], Usage.of(generation.usage()))
