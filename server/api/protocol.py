"""The bodies of requests, under their wire names, with every range that does not depend on the model.

Fields that are not declared here land in `model_extra`; `ignored_fields` says what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from server.chat_template import join_text_parts

MAX_PROMPTS = 1024
"""Prompts in one completion request, as in vLLM."""
MAX_N = 128
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROB_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 10_000
MAX_CACHE_SALT_CHARS = 128


def _strings(value: Any) -> tuple[str, ...]:
    """`stop`: nothing, a string, or a list of them."""
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError("must be a string or a list of strings")
    if len(values) > MAX_STOP_STRINGS:
        raise ValueError(f"must hold at most {MAX_STOP_STRINGS} strings")
    if any(item == "" for item in values):
        raise ValueError("must not hold an empty string")
    if any(len(item) > MAX_STOP_CHARS for item in values):
        raise ValueError(f"must hold strings of at most {MAX_STOP_CHARS} characters")
    return tuple(values)


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1 or at least 1")
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """`prompt` in its four forms, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        prompts: list[Any] = [value] if type(value[0]) is int else value
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"must hold at most {MAX_PROMPTS} prompts")
        # Types are compared, since isinstance takes True for an int, and in C, since there may be millions.
        if set(map(type, prompts)) == {str} or (
            set(map(type, prompts)) == {list} and all(set(map(type, prompt)) == {int} for prompt in prompts)
        ):
            return prompts
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    )


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must hold at most {MAX_LOGIT_BIAS} entries")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ValueError(f"must have token ids as keys, not {key[:20]!a}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"must have biases from -100 to 100; that of {key} is not")
        biases[int(key)] = float(bias)
    return biases


StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                    "maxItems": MAX_STOP_STRINGS,
                },
                {"type": "null"},
            ]
        }
    ),
]
_TOKEN_ID_SCHEMA = {"type": "integer", "minimum": 0}
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": _TOKEN_ID_SCHEMA, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": _TOKEN_ID_SCHEMA, "minItems": 1},
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                },
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": MAX_LOGIT_BIAS,
                },
                {"type": "null"},
            ]
        }
    ),
]


TokensToKeep = Annotated[int, Field(ge=-1, lt=2**63), AfterValidator(_not_zero)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
"""Only the first mistake is noted: noting each of a million takes seconds, in which nothing else is served."""


class WireModel(BaseModel):
    """A JSON object from a client: no coercion ("5" is no number), unknown fields are kept to be named."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), allow_inf_nan=False)


# Fields of several bodies.
MODEL: Any = Field(None, description="A name of the served model. Default: the one there is.")
MESSAGES: Any = Field(
    min_length=1,
    max_length=MAX_MESSAGES,
    fail_fast=True,
    description="The conversation, oldest message first. Required.",
)
ADD_GENERATION_PROMPT: Any = Field(
    None,
    description="End the prompt with the beginning of the model's turn. Default: true, but with"
    " `continue_final_message`.",
)
CONTINUE_FINAL_MESSAGE: Any = Field(
    None,
    description="Leave the last message's turn open, which must be the assistant's, for the output to go on"
    " with. Default: false.",
)
ADD_SPECIAL_TOKENS: Any = Field(None, description="Begin with `<bos>`. Default: true.")
RETURN_TOKEN_STRS: Any = Field(None, description="Return the tokens' texts, too. Default: false.")


class StreamOptions(WireModel):
    include_usage: bool = Field(
        False, description="Send one more chunk, without choices, that has `usage`. Default: false."
    )
    continuous_usage_stats: bool = Field(
        False, description="Put the usage so far into every chunk. Default: false."
    )


class GenerationFields(WireModel):
    """What chat completions and completions have in common. Null means the default everywhere."""

    model: str | None = MODEL
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample of the likeliest tokens that have this much probability together. Default: 1.",
    )
    top_k: int | None = Field(
        None, ge=-1, description="Sample of so many likeliest tokens. -1 and 0 mean off. Default: off."
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sample of the tokens at least this likely beside the likeliest. Default: 0.",
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Choice i of `n` is generated with seed + i. Default: random."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from the logits of tokens generated before. Default: 0."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="As `presence_penalty`, as often as they were generated. Default: 0."
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=2,
        description="Makes tokens of the prompt and the output less likely; 1 means off. Default: 1.",
    )
    logit_bias: LogitBias = Field(
        {}, description="Token ids (as strings) and what is added to their logits. Default: none."
    )
    stop: StopStrings = Field(
        (), description="Texts that end the output; they are not part of it. Default: none."
    )
    stop_token_ids: TokenIds | None = Field(
        None,
        max_length=MAX_STOP_TOKEN_IDS,
        description="Token ids that end the output, beside the model's own. Default: none.",
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Leave the matched stop text in the output. Default: false."
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave control tokens out of the output's text. Default: true."
    )
    min_tokens: int | None = Field(
        None, ge=0, description="No stop token is sampled before so many tokens. Default: 0."
    )
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end tokens. Default: false.")
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices for each prompt. Default: 1.")
    stream: bool | None = Field(None, description="Answer with server-sent events. Default: false.")
    stream_options: StreamOptions | None = Field(
        None, description="What else a stream holds; needs `stream`. Default: nothing."
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        description="Return the log probability and the rank of each token of the prompt, and those of so many"
        " likeliest ones. At most --max-logprobs; not with `stream`. Default: none.",
    )
    logprob_token_ids: TokenIds | None = Field(
        None,
        max_length=MAX_LOGPROB_TOKEN_IDS,
        description="Report the log probabilities of these tokens, too, behind the likeliest; needs"
        " `logprobs`. Default: none.",
    )
    return_token_ids: bool | None = Field(
        None, description="Return the token ids of prompt and output. Default: false."
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Write tokens in `logprobs` as `token_id:5`. Default: false."
    )
    truncate_prompt_tokens: TokensToKeep | None = Field(
        None,
        description="Keep only so many tokens of the prompt, its `<bos>` among them; -1: as many as leave room"
        " for the output. Default: all.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Where `truncate_prompt_tokens` takes tokens away. Default: left."
    )
    priority: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="Requests with a lower one are served first and are interrupted last. Default: 0.",
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CACHE_SALT_CHARS,
        description="Share cached prefixes only with requests that have the same salt and API key."
        " Default: none.",
    )


class TextPart(WireModel):
    type: Literal["text"] = Field(description="The kind of part. Required.")
    text: str = Field(description="Control tokens in it are text. Required.")


TextParts = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(WireModel):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who speaks; what a system or developer says goes into the next user turn. Required."
    )
    content: str | TextParts = Field(
        description="Only text: this model sees no images and hears no audio. Required."
    )

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return join_text_parts(part.text for part in self.content)


class ChatCompletionRequest(GenerationFields):
    messages: list[Message] = MESSAGES
    max_tokens: int | None = Field(
        None, ge=1, description="Superseded by `max_completion_tokens`. Default: what fits the context."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate at most. Default: what fits the context."
    )
    logprobs: bool | None = Field(None, description="Return the log probability of each token. Default: false.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        description="Return those of so many likeliest tokens, too; needs `logprobs`. At most --max-logprobs."
        " Default: 0.",
    )
    add_generation_prompt: bool | None = ADD_GENERATION_PROMPT
    continue_final_message: bool | None = CONTINUE_FINAL_MESSAGE
    echo: bool | None = Field(
        None, description="Put the last message, if the assistant's, before the output. Default: false."
    )


class CompletionRequest(GenerationFields):
    prompt: Prompts = Field(
        description="Text (control tokens in it are real) or token ids, one or several. Required."
    )
    suffix: str | None = Field(
        None,
        description="What follows the output, which is to fit between prompt and suffix; control tokens in both"
        " are text. Only for models with tokens for it (CodeGemma). Default: none.",
    )
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="Tokens to generate at most; 0 only with `echo` or `prompt_logprobs`. Default: 16.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Return log probabilities, with so many alternatives. At most --max-logprobs."
        " Default: none.",
    )
    echo: bool | None = Field(
        None, description="Put the prompt, and its log probabilities, before the output. Default: false."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_N,
        description="Generate so many choices and return the `n` with the highest mean log probability of a"
        " token, the best first; not with `stream`. Default: `n`.",
    )
    add_special_tokens: bool | None = ADD_SPECIAL_TOKENS


class TokenizeCompletionRequest(WireModel):
    model: str | None = MODEL
    prompt: str = Field(description="Text, in which control tokens are real. Required.")
    add_special_tokens: bool | None = ADD_SPECIAL_TOKENS
    return_token_strs: bool | None = RETURN_TOKEN_STRS


class TokenizeChatRequest(WireModel):
    model: str | None = MODEL
    messages: list[Message] = MESSAGES
    add_generation_prompt: bool | None = ADD_GENERATION_PROMPT
    continue_final_message: bool | None = CONTINUE_FINAL_MESSAGE
    return_token_strs: bool | None = RETURN_TOKEN_STRS


class DetokenizeRequest(WireModel):
    model: str | None = MODEL
    tokens: TokenIds = Field(description="Token ids, control tokens among them shown. Required.")
