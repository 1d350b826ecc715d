"""The body of a request, under its wire names. As in chat completions, what is not declared is named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.field_types import WireModel
from server.api.formats import FORM, FORM_DESCRIPTION, FORM_NAME, FORM_STRICT, JsonSchema
from server.api.protocol import MODEL, STREAM, TOP_P
from server.api.tools import ToolChoiceField
from server.limits import MAX_MESSAGES, MAX_NAME_CHARS

LOGPROBS = "message.output_text.logprobs"
"""What `include` can ask for here."""


class InputContent(WireModel):
    type: Literal["input_text", "output_text", "text"] = Field(description="The kind of part. Required.")
    text: str = Field(description="Control tokens in it are text. Required.")


InputContents = Annotated[list[InputContent], Field(fail_fast=True)]


class InputItem(WireModel):
    """A message, a call or its result. Which of the fields belong to it depends on its type."""

    type: Literal["message", "function_call", "function_call_output"] = Field(
        "message", description="The kind of item. Default: message."
    )
    role: Literal["user", "assistant", "system", "developer"] | None = Field(
        None, description="Of a message: who speaks. Default: none, in others."
    )
    content: str | InputContents | None = Field(
        None, description="Of a message; only text. Default: none, in others."
    )
    call_id: str | None = Field(
        None, min_length=1, description="Of a call and of its output. Default: none, in others."
    )
    name: str | None = Field(
        None,
        max_length=MAX_NAME_CHARS,
        description="Of a call: the function's. Default: none, in others.",
    )
    arguments: str | None = Field(
        None, description="Of a call: JSON, as the model wrote it. Default: none, in others."
    )
    output: str | InputContents | None = Field(
        None, description="Of a call's output; only text. Default: none, in others."
    )


class FlatFunctionTool(WireModel):
    type: Literal["function"] = Field(description="The kind of tool. Required.")
    name: str = Field(description="1 to 128 letters, digits, underscores and dashes. Required.")
    description: str | None = Field(None, description="For the model to choose by. Default: none.")
    parameters: dict[str, Any] | None = Field(
        None, description="The JSON schema of the arguments. Default: there are none."
    )
    strict: bool | None = Field(
        None, description="Refuse parameters of which a part cannot be enforced. Default: false."
    )


class TextFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"] = FORM
    name: str | None = FORM_NAME
    description: str | None = FORM_DESCRIPTION
    json_schema: JsonSchema | None = Field(
        None,
        alias="schema",
        description="Of a `json_schema`: every keyword is followed, or refused. Default: none.",
    )
    strict: bool | None = FORM_STRICT


class TextOptions(WireModel):
    format: TextFormat | None = Field(None, description="What form the output has. Default: text.")


InputItems = Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ResponsesRequest(WireModel):
    model: str | None = MODEL
    input: str | InputItems = Field(description="The conversation: all of it, since nothing is kept. Required.")
    instructions: str | None = Field(None, description="What precedes the conversation. Default: none.")
    tools: Annotated[list[FlatFunctionTool], Field(fail_fast=True)] | None = Field(
        None, description="Functions that the model may call. Default: none."
    )
    tool_choice: ToolChoiceField = Field(
        None, description="Whether and what the model calls. Default: `auto` with tools, `none` without."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether the model may call several at once. Default: true."
    )
    text: TextOptions | None = Field(None, description="The output's form. Default: text.")
    max_output_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate at most. Default: what fits the context."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = TOP_P
    top_logprobs: int | None = Field(
        None, ge=0, description="Return those of so many likeliest tokens. At most --max-logprobs. Default: 0."
    )
    include: list[str] | None = Field(None, description=f"`{LOGPROBS}` or nothing. Default: nothing.")
    metadata: dict[str, str] | None = Field(None, description="Returned as it is. Default: none.")
    stream: bool | None = STREAM
    store: bool | None = Field(None, description="Responses are not kept, whatever it says. Default: false.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="Input is never truncated. Default: disabled."
    )
    previous_response_id: str | None = Field(
        None, description="Refused: responses are not kept. Default: none."
    )
    conversation: str | dict[str, Any] | None = Field(
        None, description="Refused: conversations are not kept. Default: none."
    )
    background: bool | None = Field(None, description="Only false is accepted. Default: false.")
    prompt: dict[str, Any] | None = Field(
        None, description="Refused: there are no stored prompts. Default: none."
    )
