"""From the fields of a request to what the engine and the front need to know about each sequence."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from server.api.constraints import OutputConstraints
from server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from server.engine.types import SamplingParams
from server.errors import InvalidRequestError
from server.frontend.fitting import check_token_ids
from server.frontend.request_state import StopConditions
from server.frontend.served_model import ServedModel
from server.frontend.tool_plan import NO_TOOLS, ToolPlan

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0
SMALLEST_TOP_P = 1e-9
"""Stands for 0, which OpenAI allows: the likeliest token alone reaches either."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's defaults."""
SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How many alternatives to report with each token; None: no log probabilities at all."""

    output: int | None = None
    prompt: int | None = None
    token_ids: tuple[int, ...] = ()
    """Reported with each token of the output, likely or not."""


NO_LOGPROBS = Logprobs()


@dataclass(frozen=True, slots=True)
class ChoiceParams:
    sampling: SamplingParams
    stop: StopConditions


def chat_logprobs(body: ChatCompletionRequest, max_logprobs: int) -> Logprobs:
    prompt = _prompt_logprobs(body, max_logprobs)
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequestError(
                f"'top_logprobs' is {body.top_logprobs}, which needs 'logprobs' to be true.",
                param="top_logprobs",
            )
        _check_no_token_ids(body)
        return Logprobs(prompt=prompt)
    top = body.top_logprobs or 0
    check_logprobs(top, max_logprobs, "top_logprobs")
    return Logprobs(top, prompt, tuple(body.logprob_token_ids or ()))


def completion_logprobs(body: CompletionRequest, max_logprobs: int) -> Logprobs:
    prompt = _prompt_logprobs(body, max_logprobs)
    if body.logprobs is None:
        _check_no_token_ids(body)
        return Logprobs(output=0 if num_generated_choices(body) > (body.n or 1) else None, prompt=prompt)
    check_logprobs(body.logprobs, max_logprobs, "logprobs")
    if body.echo:
        prompt = max(body.logprobs, prompt or 0)
    return Logprobs(body.logprobs, prompt, tuple(body.logprob_token_ids or ()))


def num_generated_choices(body: CompletionRequest) -> int:
    """Of each prompt. The `n` best of them are returned."""
    n = body.n or 1
    if body.best_of is None:
        return n
    if body.best_of < n:
        raise InvalidRequestError(
            f"'best_of' must be at least 'n', which is {n}, got {body.best_of}.", param="best_of"
        )
    if body.stream and body.best_of > n:
        raise InvalidRequestError(
            f"'best_of' is {body.best_of} and 'n' is {n}: which choices are the best shows at their end,"
            " so that they cannot be streamed.",
            param="best_of",
        )
    return body.best_of


def check_logprobs(value: int, limit: int, param: str) -> None:
    """Raises InvalidRequestError if `value` alternatives are more than the server reports."""
    if value > limit:
        raise InvalidRequestError(f"'{param}' must be at most {limit}, got {value}.", param=param)


def check_stream_options(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("'stream_options' needs 'stream' to be true.", param="stream_options")


def choices_of_prompt(
    body: GenerationFields,
    model: ServedModel,
    *,
    max_tokens: int,
    logprobs: Logprobs,
    count: int,
    constraints: OutputConstraints,
    more_stop_token_ids: Iterable[int] = (),
    tools: ToolPlan = NO_TOOLS,
) -> list[ChoiceParams]:
    """The parameters of each of the `count` choices of one prompt, checked against the model.

    `more_stop_token_ids`: for this request as the model's own.

    Choice i gets seed + i, so that a seed gives one text per choice however many prompts the request has.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {min_tokens}, more than the {max_tokens} tokens that may be generated.",
            param="min_tokens",
        )
    check_token_ids(body.logit_bias, model.info, "logit_bias")
    own_stops = tuple(body.stop_token_ids or ())
    check_token_ids(own_stops, model.info, "stop_token_ids")
    check_token_ids(logprobs.token_ids, model.info, "logprob_token_ids")
    model_stops = () if body.ignore_eos else (*model.stop_token_ids, *more_stop_token_ids)
    stop = StopConditions(
        # What must be a call has no text to stop.
        strings=() if tools.is_required else body.stop,
        include_in_output=bool(body.include_stop_str_in_output),
        min_tokens=min_tokens,
        tools=tools,
        silent_token_ids=frozenset(model_stops) - frozenset(own_stops),
    )
    first_seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
    return [
        ChoiceParams(
            sampling=SamplingParams(
                max_tokens=max_tokens,
                seed=(first_seed + index) % 2**SEED_BITS,
                min_tokens=min_tokens,
                temperature=_or(body.temperature, DEFAULT_TEMPERATURE),
                top_p=max(_or(body.top_p, DEFAULT_TOP_P), SMALLEST_TOP_P),
                top_k=min(max(body.top_k or 0, 0), model.info.vocab_size),
                min_p=body.min_p or 0.0,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                repetition_penalty=_or(body.repetition_penalty, 1.0),
                logit_bias=body.logit_bias,
                stop_token_ids=tuple(sorted({*model_stops, *own_stops})),
                logprobs=logprobs.output,
                logprob_token_ids=logprobs.token_ids,
                prompt_logprobs=logprobs.prompt,
                grammar=constraints.grammar,
                allowed_token_ids=constraints.allowed_token_ids,
                bad_words=constraints.bad_words,
            ),
            stop=stop,
        )
        for index in range(count)
    ]


def _prompt_logprobs(body: GenerationFields, max_logprobs: int) -> int | None:
    if body.prompt_logprobs is not None:
        check_logprobs(body.prompt_logprobs, max_logprobs, "prompt_logprobs")
        if body.stream:
            raise InvalidRequestError(
                "'prompt_logprobs' are not part of a stream: they need 'stream' to be false.",
                param="prompt_logprobs",
            )
    return body.prompt_logprobs


def _check_no_token_ids(body: GenerationFields) -> None:
    if body.logprob_token_ids:
        raise InvalidRequestError("'logprob_token_ids' needs 'logprobs'.", param="logprob_token_ids")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
