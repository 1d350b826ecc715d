"""The bodies of requests, under their wire names. As in OpenAI's dialect, what is not declared is named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.field_types import WireModel
from server.api.protocol import MESSAGES, MODEL, STREAM, TOP_P, TextPart
from server.limits import MAX_NAME_CHARS, MAX_STOP_CHARS, MAX_STOP_STRINGS

StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TextBlocks = Annotated[list[TextPart], Field(fail_fast=True)]


class ContentBlock(WireModel):
    """A block of a message. Which of its fields belong to it depends on its type."""

    type: Literal["text", "tool_use", "tool_result"] = Field(description="The kind of block. Required.")
    text: str | None = Field(None, description="Of a `text`. Default: none, in others.")
    id: str | None = Field(None, min_length=1, description="Of a `tool_use`. Default: none, in others.")
    name: str | None = Field(
        None, max_length=MAX_NAME_CHARS, description="Of a `tool_use`. Default: none, in others."
    )
    input: dict[str, Any] | None = Field(None, description="Of a `tool_use`. Default: none, in others.")
    tool_use_id: str | None = Field(None, description="Of a `tool_result`. Default: none, in others.")
    content: str | TextBlocks | None = Field(None, description="Of a `tool_result`; only text. Default: empty.")
    is_error: bool | None = Field(
        None, description="Of a `tool_result`: whether the tool failed. Default: false."
    )


ContentBlocks = Annotated[list[ContentBlock], Field(fail_fast=True)]


class InputMessage(WireModel):
    role: Literal["user", "assistant"] = Field(description="Who speaks. Required.")
    content: str | ContentBlocks = Field(
        description="Only text and tools: this model sees no images. Required."
    )


class ToolDefinition(WireModel):
    type: Literal["custom"] | None = Field(None, description="The kind of tool. Default: custom.")
    name: str = Field(description="1 to 128 letters, digits, underscores and dashes. Required.")
    description: str | None = Field(None, description="For the model to choose by. Default: none.")
    input_schema: dict[str, Any] = Field(description="The JSON schema of the input. Required.")
    strict: bool | None = Field(
        None, description="Refuse a schema of which a part cannot be enforced. Default: false."
    )


class ToolUse(WireModel):
    """`tool_choice`"""

    type: Literal["auto", "any", "tool", "none"] = Field(description="Whether tools are used. Required.")
    name: str | None = Field(None, description="Of a `tool`: which one. Default: none, in others.")
    disable_parallel_tool_use: bool | None = Field(
        None, description="Have the model use one tool at most. Default: false."
    )


class CountTokensRequest(WireModel):
    model: str | None = MODEL
    messages: list[InputMessage] = MESSAGES
    system: str | TextBlocks | None = Field(None, description="What precedes the conversation. Default: none.")
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True)] | None = Field(
        None, description="Tools that the model may use. Default: none."
    )
    tool_choice: ToolUse | None = Field(
        None, description="Whether and which tools are used. Default: `auto` with tools, `none` without."
    )


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(
        ge=1, description="Tokens to generate at most. Fewer, if fewer fit the model's context. Required."
    )
    stop_sequences: Annotated[list[StopSequence], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_STOP_STRINGS,
        description="Texts that end the output; they are not part of it. Default: none.",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = TOP_P
    top_k: int | None = Field(
        None, ge=0, description="Sample of so many likeliest tokens; 0 means off. Default: off."
    )
    stream: bool | None = STREAM
