"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server.api.constraints import output_constraints
from server.api.logprobs import CompletionLogprobsWriter, extend
from server.api.openapi import body_of
from server.api.params import (
    DEFAULT_COMPLETION_TOKENS,
    check_stream_options,
    choices_of_prompt,
    completion_logprobs,
)
from server.api.prompts import prompt_token_ids
from server.api.protocol import CompletionRequest
from server.api.responses import Completion, CompletionChoice, CompletionLogprobs, Head, Usage
from server.api.serving import admission_of, admit, answer, read_body, runtime_of, served_model, stream
from server.engine.types import FinishReason
from server.errors import InvalidRequestError
from server.frontend.admission import check_token_ids, resolve_max_tokens
from server.frontend.generation import ChoiceDelta, ChoiceRequest, Generation, UsageCounts
from server.tokenizer import BOS, Tokenizer

router = APIRouter()


@router.post(
    "/v1/completions",
    summary="Continue a text",
    openapi_extra=body_of(CompletionRequest, answer=Completion, stream=Completion),
)
async def create_completion(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, CompletionRequest)
    model = served_model(runtime, body.model)
    check_stream_options(body)
    _check_echo_and_best_of(body)
    admission_of(request).check_count(len(body.prompt) * (body.n or 1))
    logprobs = completion_logprobs(body, runtime.config.max_logprobs)
    prompts = await prompt_token_ids(body.prompt, model)
    constraints = await output_constraints(body, model, runtime.grammars)
    choices = []
    for index, token_ids in enumerate(prompts):
        max_tokens = resolve_max_tokens(
            len(token_ids),
            body.max_tokens,
            model.info,
            param="prompt",
            max_tokens_param="max_tokens",
            default=DEFAULT_COMPLETION_TOKENS,
        )
        check_token_ids(token_ids, model.info, "prompt")
        # The engine computes a prompt's log probabilities on the way to a token: scoring alone drops that one.
        choices += [
            ChoiceRequest(index, token_ids, params.sampling, params.stop)
            for params in choices_of_prompt(
                body, model, max_tokens=max(max_tokens, 1), logprobs=logprobs, constraints=constraints
            )
        ]
    generation = admit(request, model, choices, body.cache_salt)
    head = Head.new("cmpl", model.names[0])
    writers = [_ChoiceWriter(body, choice, model.tokenizer) for choice in choices]
    if body.stream:
        return stream(request, generation, _chunks(generation, head, body, writers), headers)
    return await answer(request, generation, _whole(generation, head, body, writers), headers)


def _check_echo_and_best_of(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError("'max_tokens' must be at least 1 without 'echo', got 0.", param="max_tokens")
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequestError(
            f"'best_of' is supported only with the value of 'n', which is {n}, got {body.best_of}.",
            param="best_of",
        )


class _ChoiceWriter:
    """Makes the parts of one choice's answer."""

    def __init__(self, body: CompletionRequest, choice: ChoiceRequest, tokenizer: Tokenizer) -> None:
        prompt = body.prompt[choice.prompt_index]
        self._prompt_text = prompt if isinstance(prompt, str) else None
        self._prompt_token_ids = choice.prompt_token_ids
        self._tokenizer = tokenizer
        self._echo_pending = bool(body.echo)
        self._only_prompt = body.max_tokens == 0
        self._logprobs = None if body.logprobs is None else CompletionLogprobsWriter(tokenizer)

    def part(self, delta: ChoiceDelta) -> CompletionChoice:
        logprobs = None if self._logprobs is None else CompletionLogprobs([], [], [], [])
        text = ""
        if self._echo_pending:
            self._echo_pending = False
            text = self._echoed_text()
            if self._logprobs is not None and logprobs is not None:
                extend(logprobs, self._echoed_logprobs(self._logprobs, delta))
        finish_reason: str | None = delta.text.finish_reason
        stop_reason = delta.text.stop_reason
        if self._only_prompt:
            finish_reason, stop_reason = (FinishReason.LENGTH if finish_reason else None), None
        else:
            text += delta.text.text
            if self._logprobs is not None and logprobs is not None:
                extend(logprobs, self._logprobs.output(delta.text.logprobs or []))
        return CompletionChoice(
            delta.index, text, logprobs, finish_reason, stop_reason if finish_reason is not None else UNSET
        )

    def _echoed_text(self) -> str:
        if self._prompt_text is not None:
            return self._prompt_text
        return self._tokenizer.decode(self._prompt_token_ids, skip_special_tokens=False)

    def _echoed_logprobs(self, writer: CompletionLogprobsWriter, delta: ChoiceDelta) -> CompletionLogprobs:
        hide_bos = self._prompt_text is not None and not self._prompt_text.startswith(BOS)
        return writer.prompt(self._prompt_token_ids, delta.prompt_logprobs or [], hide_bos=hide_bos)


async def _whole(
    generation: Generation, head: Head, body: CompletionRequest, writers: list[_ChoiceWriter]
) -> Completion:
    choices = [CompletionChoice(index, "", None, None) for index in range(len(writers))]
    texts: list[list[str]] = [[] for _ in writers]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            part = writers[delta.index].part(delta)
            choice = choices[delta.index]
            texts[delta.index].append(part.text)
            if choice.logprobs is None:
                choice.logprobs = part.logprobs
            elif part.logprobs is not None:
                extend(choice.logprobs, part.logprobs)
            choice.finish_reason, choice.stop_reason = part.finish_reason, part.stop_reason
    for choice, parts in zip(choices, texts, strict=True):
        choice.text = "".join(parts)
    return Completion(head.id, head.created, head.model, choices, _usage(generation, body))


async def _chunks(
    generation: Generation, head: Head, body: CompletionRequest, writers: list[_ChoiceWriter]
) -> AsyncGenerator[Completion, None]:
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    continuous = options is not None and options.continuous_usage_stats
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choice = writers[delta.index].part(delta)
            has_logprobs = choice.logprobs is not None and choice.logprobs.tokens
            if choice.text or has_logprobs or choice.finish_reason is not None:
                usage = _usage(generation, body) if continuous else (None if with_usage else UNSET)
                yield Completion(head.id, head.created, head.model, [choice], usage)
    if with_usage:
        yield Completion(head.id, head.created, head.model, [], _usage(generation, body))


def _usage(generation: Generation, body: CompletionRequest) -> Usage:
    counts = generation.usage()
    if body.max_tokens == 0:
        counts = UsageCounts(counts.prompt_tokens, 0, counts.cached_tokens)
    return Usage.of(counts)
