"""From the fields of a request to what the engine and the front need to know about each sequence."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from server.engine.types import SamplingParams
from server.errors import InvalidRequestError
from server.frontend.admission import check_token_ids
from server.frontend.request_state import StopConditions
from server.frontend.served_model import ServedModel

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


@dataclass(frozen=True, slots=True)
class ChoiceParams:
    sampling: SamplingParams
    stop: StopConditions


def chat_logprobs(body: ChatCompletionRequest, max_logprobs: int) -> Logprobs:
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequestError(
                f"'top_logprobs' is {body.top_logprobs}, which needs 'logprobs' to be true.",
                param="top_logprobs",
            )
        return Logprobs()
    top = body.top_logprobs or 0
    _check_logprobs(top, max_logprobs, "top_logprobs")
    return Logprobs(output=top)


def completion_logprobs(body: CompletionRequest, max_logprobs: int) -> Logprobs:
    if body.logprobs is None:
        return Logprobs()
    _check_logprobs(body.logprobs, max_logprobs, "logprobs")
    return Logprobs(output=body.logprobs, prompt=body.logprobs if body.echo else None)


def check_stream_options(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("'stream_options' needs 'stream' to be true.", param="stream_options")


def choices_of_prompt(
    body: GenerationFields, model: ServedModel, *, max_tokens: int, logprobs: Logprobs
) -> list[ChoiceParams]:
    """The parameters of each of the `n` choices of one prompt, checked against the model.

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
    model_stops = () if body.ignore_eos else model.stop_token_ids
    stop = StopConditions(
        strings=body.stop,
        include_in_output=bool(body.include_stop_str_in_output),
        min_tokens=min_tokens,
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
                prompt_logprobs=logprobs.prompt,
            ),
            stop=stop,
        )
        for index in range(body.n or 1)
    ]


def _check_logprobs(value: int, limit: int, param: str) -> None:
    if value > limit:
        raise InvalidRequestError(f"'{param}' must be at most {limit}, got {value}.", param=param)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
