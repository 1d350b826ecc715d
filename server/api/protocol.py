"""The bodies of requests, under their wire names, with every range that does not depend on the model.

Fields that are not declared here land in `model_extra`; `ignored_fields` says what becomes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.field_types import BadWord, LogitBias, Prompts, StopStrings, TokenIds, TokensToKeep, WireModel
from server.api.formats import Choices, ResponseFormat, StructuredOutputs
from server.api.tools import DeclaredTool, ToolChoiceField
from server.limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_CACHE_SALT_CHARS,
    MAX_CALLS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_MESSAGES,
    MAX_N,
    MAX_NAME_CHARS,
    MAX_STOP_TOKEN_IDS,
)
from server.tool_format import Tool

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
TOP_P: Any = Field(
    None,
    ge=0,
    le=1,
    description="Sample of the likeliest tokens that have this much probability together; 0 is greedy."
    " Default: 1.",
)
STREAM: Any = Field(None, description="Answer with server-sent events. Default: false.")
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
    top_p: float | None = TOP_P
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
    allowed_token_ids: TokenIds | None = Field(
        None,
        min_length=1,
        max_length=MAX_ALLOWED_TOKEN_IDS,
        description="The only token ids that are sampled, end tokens included. Default: all.",
    )
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = Field(
        None, description="Texts that are not generated, alone or behind a space. Default: none."
    )
    response_format: ResponseFormat | None = Field(
        None, description="What form the output has, as OpenAI has it. Default: text."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="What form the output has, as vLLM has it. Default: any."
    )
    guided_json: dict[str, Any] | str | None = Field(
        None, description="As `structured_outputs.json`. Default: none."
    )
    guided_regex: str | None = Field(None, description="As `structured_outputs.regex`. Default: none.")
    guided_choice: Choices | None = Field(None, description="As `structured_outputs.choice`. Default: none.")
    guided_grammar: str | None = Field(None, description="As `structured_outputs.grammar`. Default: none.")
    guided_json_object: bool | None = Field(
        None, description="As `structured_outputs.json_object`. Default: false."
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices for each prompt. Default: 1.")
    stream: bool | None = STREAM
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


class CalledFunction(WireModel):
    name: str = Field(max_length=MAX_NAME_CHARS, description="The function's. Required.")
    arguments: str = Field(description="JSON, as the model wrote it. Required.")


class MessageToolCall(WireModel):
    id: str = Field(min_length=1, description="What the result's `tool_call_id` repeats. Required.")
    type: Literal["function"] = Field("function", description="The kind of call. Default: function.")
    function: CalledFunction = Field(description="What was called, and with what. Required.")


class Message(WireModel):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks; what a system or developer says goes into the next user turn, or with"
        " FunctionGemma into the developer's. Required."
    )
    content: str | TextParts | None = Field(
        None,
        description="Only text: this model sees no images and hears no audio. Default: none, which only an"
        " assistant's message with `tool_calls` may have.",
    )
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = Field(
        None, max_length=MAX_CALLS, description="What the assistant called. Default: nothing."
    )
    tool_call_id: str | None = Field(
        None, description="The call whose result a `tool` message is. Default: none, in other messages."
    )


class FunctionDefinition(WireModel):
    name: str = Field(description="1 to 128 letters, digits, underscores and dashes. Required.")
    description: str | None = Field(None, description="For the model to choose by. Default: none.")
    parameters: dict[str, Any] | None = Field(
        None, description="The JSON schema of the arguments. Default: there are none."
    )
    strict: bool | None = Field(
        None,
        description="Refuse parameters of which a part cannot be enforced; all else is enforced in any case."
        " Default: false.",
    )


class FunctionTool(WireModel):
    type: Literal["function"] = Field(description="The kind of tool. Required.")
    function: FunctionDefinition = Field(description="The function itself. Required.")


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
    tools: FunctionTools | None = Field(None, description="Functions that the model may call. Default: none.")
    tool_choice: ToolChoiceField = Field(
        None, description="Whether and what the model calls. Default: `auto` with tools, `none` without."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether the model may call several at once. Default: true."
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
    tools: FunctionTools | None = Field(None, description="Those of the chat completion. Default: none.")
    add_generation_prompt: bool | None = ADD_GENERATION_PROMPT
    continue_final_message: bool | None = CONTINUE_FINAL_MESSAGE
    return_token_strs: bool | None = RETURN_TOKEN_STRS


class DetokenizeRequest(WireModel):
    model: str | None = MODEL
    tokens: TokenIds = Field(description="Token ids, control tokens among them shown. Required.")
