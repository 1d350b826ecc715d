"""The bodies of requests, under their wire names, with every range that does not depend on the model.

Fields that are not declared here land in `model_extra`; `ignored_fields` says what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from server.api.formats import Choices, ResponseFormat, StructuredOutputs
from server.api.tools import DeclaredTool, ToolChoiceField
from server.tool_format import Tool

MAX_PROMPTS = 1024
"""Prompts in one completion request, as in vLLM."""
MAX_N = 128
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 16_384
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1000
MAX_MESSAGES = 10_000
MAX_CACHE_SALT_CHARS = 128
MAX_CALLS = 1024
"""Tool calls in one message."""


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


TokenIds = Annotated[list[int], Field(fail_fast=True)]
"""Only the first mistake is noted: noting each of a million takes seconds, in which nothing else is served."""
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]


class WireModel(BaseModel):
    """A JSON object from a client: no coercion ("5" is no number), unknown fields are kept to be named."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), allow_inf_nan=False)


class StreamOptions(WireModel):
    include_usage: bool = Field(False, description="Send one more chunk, without choices, that has `usage`.")
    continuous_usage_stats: bool = Field(False, description="Put the usage so far into every chunk.")


class GenerationFields(WireModel):
    """What chat completions and completions have in common. Null means the default everywhere."""

    model: str | None = Field(None, description="A name of the served model; the one there is if not given.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default: 1.")
    top_k: int | None = Field(None, ge=-1, description="-1 and 0 mean off. Default: off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Default: 0.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Choice i of `n` is generated with seed + i. Default: random."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Default: 0.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Default: 0.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=2, description="1 means off. Default: 1.")
    logit_bias: LogitBias = Field({}, description="Token ids (as strings) and what is added to their logits.")
    stop: StopStrings = Field((), description="Texts that end the output; they are not part of it.")
    stop_token_ids: TokenIds | None = Field(
        None,
        max_length=MAX_STOP_TOKEN_IDS,
        description="Token ids that end the output, beside the model's own.",
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Leave the matched stop text in the output."
    )
    min_tokens: int | None = Field(None, ge=0, description="No stop token is sampled before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's own end tokens.")
    allowed_token_ids: TokenIds | None = Field(
        None,
        min_length=1,
        max_length=MAX_ALLOWED_TOKEN_IDS,
        description="The only token ids that are sampled, end tokens included.",
    )
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = Field(
        None, description="Texts that are not generated, alone or behind a space."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="As `structured_outputs.json`.")
    guided_regex: str | None = Field(None, description="As `structured_outputs.regex`.")
    guided_choice: Choices | None = Field(None, description="As `structured_outputs.choice`.")
    guided_grammar: str | None = Field(None, description="As `structured_outputs.grammar`.")
    guided_json_object: bool | None = Field(None, description="As `structured_outputs.json_object`.")
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices for each prompt. Default: 1.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CACHE_SALT_CHARS,
        description="Share cached prefixes only with requests that have the same salt and API key.",
    )


class TextPart(WireModel):
    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(fail_fast=True)]


class CalledFunction(WireModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class MessageToolCall(WireModel):
    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(WireModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | TextParts | None = Field(
        None,
        description="Only text: this model sees no images and hears no audio. Null beside `tool_calls` alone.",
    )
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = Field(
        None, max_length=MAX_CALLS, description="What the assistant called."
    )
    tool_call_id: str | None = Field(None, description="The call whose result a `tool` message is.")


class FunctionDefinition(WireModel):
    name: str = Field(description="1 to 128 letters, digits, underscores and dashes.")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="The JSON schema of the arguments. Default: there are none."
    )
    strict: bool | None = Field(
        None,
        description="Refuse parameters of which a part cannot be enforced. All else is enforced in any case.",
    )


class FunctionTool(WireModel):
    type: Literal["function"]
    function: FunctionDefinition


FunctionTools = Annotated[list[FunctionTool], Field(fail_fast=True)]


def declared_tools(tools: list[FunctionTool] | None) -> list[DeclaredTool]:
    return [
        DeclaredTool(
            Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {}),
            is_strict=bool(tool.function.strict),
            name_param=f"tools[{index}].function.name",
            parameters_param=f"tools[{index}].function.parameters",
        )
        for index, tool in enumerate(tools or ())
    ]


class ChatCompletionRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, description="Superseded by `max_completion_tokens`.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate at most. Default: what fits the context."
    )
    logprobs: bool | None = Field(None, description="Return the log probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, description="Return those of so many likeliest tokens, too; needs `logprobs`."
    )
    tools: FunctionTools | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoiceField = Field(
        None, description="Whether and what the model calls. Default: `auto` with tools, `none` without."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether the model may call several at once. Default: true."
    )


class CompletionRequest(GenerationFields):
    prompt: Prompts = Field(description="Text (control tokens in it are real) or token ids, one or several.")
    max_tokens: int | None = Field(None, ge=0, description="0 only with `echo`. Default: 16.")
    logprobs: int | None = Field(None, ge=0, description="Return log probabilities, with so many alternatives.")
    echo: bool | None = Field(None, description="Put the prompt, and its log probabilities, before the output.")
    best_of: int | None = Field(None, ge=1, le=MAX_N, description="Only the value of `n` is supported.")


class TokenizeCompletionRequest(WireModel):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(True, description="Begin with `<bos>`.")
    return_token_strs: bool | None = None


class TokenizeChatRequest(WireModel):
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    tools: FunctionTools | None = Field(None, description="Those of the chat completion.")
    add_generation_prompt: bool = Field(True, description="End with the beginning of the model's turn.")
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: TokenIds
