"""The bodies of requests, under their wire names. As in OpenAI's dialect, what is not declared is named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.protocol import TextPart
from server.api.wire_types import MAX_MESSAGES, WireModel

MAX_STOP_SEQUENCES = 4
MAX_STOP_CHARS = 1000

StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TextBlocks = Annotated[list[TextPart], Field(fail_fast=True)]


class ContentBlock(WireModel):
    """A block of a message. Which of its fields belong to it depends on its type."""

    type: Literal["text", "tool_use", "tool_result"]
    text: str | None = Field(None, description="Of a `text`.")
    id: str | None = Field(None, min_length=1, description="Of a `tool_use`.")
    name: str | None = Field(None, description="Of a `tool_use`.")
    input: dict[str, Any] | None = Field(None, description="Of a `tool_use`.")
    tool_use_id: str | None = Field(None, description="Of a `tool_result`.")
    content: str | TextBlocks | None = Field(None, description="Of a `tool_result`. Only text.")
    is_error: bool | None = Field(None, description="Of a `tool_result`.")


ContentBlocks = Annotated[list[ContentBlock], Field(fail_fast=True)]


class InputMessage(WireModel):
    role: Literal["user", "assistant"]
    content: str | ContentBlocks = Field(description="Only text and tools: this model sees no images.")


class ToolDefinition(WireModel):
    type: Literal["custom"] | None = None
    name: str = Field(description="1 to 128 letters, digits, underscores and dashes.")
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="The JSON schema of the input.")
    strict: bool | None = Field(None, description="Refuse a schema of which a part cannot be enforced.")


class ToolUse(WireModel):
    """`tool_choice`"""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="Of a `tool`.")
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(WireModel):
    model: str | None = Field(None, description="A name of the served model; the one there is if not given.")
    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: str | TextBlocks | None = None
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True)] | None = None
    tool_choice: ToolUse | None = Field(None, description="Default: `auto` with tools, `none` without.")


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(
        ge=1, description="Tokens to generate at most. Fewer, if fewer fit the model's context."
    )
    stop_sequences: Annotated[list[StopSequence], Field(fail_fast=True)] | None = Field(
        None, max_length=MAX_STOP_SEQUENCES, description="Texts that end the output; they are not part of it."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default: 1.")
    top_k: int | None = Field(None, ge=0, description="0 means off. Default: off.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
