"""POST /v1/completions"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from server.api.completion_writer import ChoiceWriter, append
from server.api.constraints import output_constraints
from server.api.openapi import body_of
from server.api.params import (
    DEFAULT_COMPLETION_TOKENS,
    check_stream_options,
    choices_of_prompt,
    completion_logprobs,
    num_generated_choices,
)
from server.api.prompts import infill_token_ids, prompt_token_ids, truncated
from server.api.protocol import CompletionRequest
from server.api.responses import Completion, CompletionChoice, Head, Usage
from server.api.serving import (
    ChunkUsage,
    admit,
    answer,
    read_body,
    runtime_of,
    served_model,
    stream,
)
from server.api.terms import ENTERING, terms_of
from server.errors import InvalidRequestError
from server.frontend.fitting import check_token_ids, resolve_max_tokens
from server.frontend.generation import ChoiceRequest, Generation
from server.frontend.records import UsageCounts
from server.frontend.served_model import ServedModel

router = APIRouter()

PROMPTS_AT_ONCE = 64
"""Made choices of, before others have their turn on the event loop."""


@router.post(
    "/v1/completions",
    dependencies=[ENTERING],
    summary="Continue a text",
    openapi_extra=body_of(CompletionRequest, answer=Completion, stream=Completion),
)
async def create_completion(request: Request) -> Response:
    runtime = runtime_of(request)
    body, headers = await read_body(request, CompletionRequest)
    model = served_model(runtime, body.model)
    check_stream_options(body)
    _check_combinations(body)
    num_choices = num_generated_choices(body)
    terms_of(request).admission.check_count(len(body.prompt) * num_choices)
    logprobs = completion_logprobs(body, runtime.config.max_logprobs)
    constraints = await output_constraints(body, model, runtime.grammars)
    # What was written to fill a middle begins another file, or another middle, where it should end.
    more_stops = model.tokenizer.fim_ids.values() if body.suffix else ()
    choices = []
    for index, token_ids in enumerate(await prompts_of(body, model)):
        if index % PROMPTS_AT_ONCE == 0:
            await asyncio.sleep(0)
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
            ChoiceRequest(index, token_ids, params.sampling, params.stop, body.skip_special_tokens is not False)
            for params in choices_of_prompt(
                body,
                model,
                max_tokens=max(max_tokens, 1),
                logprobs=logprobs,
                count=num_choices,
                constraints=constraints,
                more_stop_token_ids=more_stops,
            )
        ]
    generation = admit(request, model, choices, body)
    head = Head.new("cmpl", model.names[0])
    writers = [ChoiceWriter(body, choice, model.tokenizer) for choice in choices]
    if body.stream:
        return stream(request, generation, _chunks(generation, head, body, writers), headers)
    return await answer(request, generation, _whole(generation, head, body, writers), headers)


def _check_combinations(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise InvalidRequestError(
            "'max_tokens' must be at least 1 without 'echo' or 'prompt_logprobs', got 0.", param="max_tokens"
        )
    if not body.suffix:
        return
    for other in ("echo", "truncate_prompt_tokens"):
        if getattr(body, other):
            raise InvalidRequestError(f"'suffix' cannot be combined with '{other}'.", param="suffix")


async def prompts_of(body: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """What the model reads for each prompt. Raises InvalidRequestError."""
    add_bos = body.add_special_tokens is not False
    if body.suffix:
        return await infill_token_ids(body.prompt, body.suffix, model, add_bos=add_bos)
    prompts = await prompt_token_ids(body.prompt, model, add_bos=add_bos)
    num_output = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return [truncated(token_ids, body, model, num_output) for token_ids in prompts]


async def _whole(
    generation: Generation, head: Head, body: CompletionRequest, writers: list[ChoiceWriter]
) -> Completion:
    choices: dict[int, CompletionChoice] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            part = await writers[delta.index].part(delta)
            if delta.index in choices:
                append(choices[delta.index], part)
            else:
                choices[delta.index] = part
    returned = _best([choices[index] for index in range(len(writers))], generation, body)
    return Completion(head.id, head.created, head.model, returned, _usage(generation, body))


def _best(
    choices: list[CompletionChoice], generation: Generation, body: CompletionRequest
) -> list[CompletionChoice]:
    """The `n` of each prompt that are returned, with the indices that they have in the answer."""
    n, count = body.n or 1, num_generated_choices(body)
    if count == n:
        return choices
    best: list[CompletionChoice] = []
    for first in range(0, len(choices), count):
        of_prompt = choices[first : first + count]
        of_prompt.sort(key=lambda choice: -generation.mean_logprob(choice.index))
        best += of_prompt[:n]
    for index, choice in enumerate(best):
        choice.index = index
    return best


async def _chunks(
    generation: Generation, head: Head, body: CompletionRequest, writers: list[ChoiceWriter]
) -> AsyncGenerator[Completion, None]:
    usage = ChunkUsage(body.stream_options, lambda: _usage(generation, body))
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choice = await writers[delta.index].part(delta)
            has_logprobs = choice.logprobs is not None and choice.logprobs.tokens
            has_ids = choice.token_ids or choice.prompt_token_ids
            if choice.text or has_logprobs or has_ids or choice.finish_reason is not None:
                yield Completion(head.id, head.created, head.model, [choice], usage.of_chunk())
    if usage.has_last_chunk:
        yield Completion(head.id, head.created, head.model, [], _usage(generation, body))


def _usage(generation: Generation, body: CompletionRequest) -> Usage:
    counts = generation.usage()
    if body.max_tokens == 0:
        counts = UsageCounts(counts.prompt_tokens, 0, counts.cached_tokens)
    return Usage.of(counts)
