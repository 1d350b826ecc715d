"""The body of a request, under its wire names. As in chat completions, what is not declared is named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.formats import JsonSchema
from server.api.wire_types import MAX_MESSAGES, WireModel
from server.api.tools import ToolChoiceField

LOGPROBS = "message.output_text.logprobs"
"""What `include` can ask for here."""


class InputContent(WireModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


InputContents = Annotated[list[InputContent], Field(fail_fast=True)]


class InputItem(WireModel):
    """A message, a call or its result. Which of the fields belong to it depends on its type."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = Field(None, description="Of a message.")
    content: str | InputContents | None = Field(None, description="Of a message. Only text.")
    call_id: str | None = Field(None, min_length=1, description="Of a call and of its output.")
    name: str | None = Field(None, description="Of a call.")
    arguments: str | None = Field(None, description="Of a call: JSON, as the model wrote it.")
    output: str | InputContents | None = Field(None, description="Of a call's output. Only text.")


class FlatFunctionTool(WireModel):
    type: Literal["function"]
    name: str = Field(description="1 to 128 letters, digits, underscores and dashes.")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="The JSON schema of the arguments. Default: there are none."
    )
    strict: bool | None = Field(None, description="Refuse parameters of which a part cannot be enforced.")


class TextFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The schema is followed either way.")


class TextOptions(WireModel):
    format: TextFormat | None = None


InputItems = Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ResponsesRequest(WireModel):
    model: str | None = Field(None, description="A name of the served model; the one there is if not given.")
    input: str | InputItems = Field(description="The conversation: all of it, since nothing is kept.")
    instructions: str | None = Field(None, description="What precedes the conversation.")
    tools: Annotated[list[FlatFunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoiceField = Field(None, description="Default: `auto` with tools, `none` without.")
    parallel_tool_calls: bool | None = Field(None, description="Default: true.")
    text: TextOptions | None = None
    max_output_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate at most. Default: what fits the context."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default: 1.")
    top_logprobs: int | None = Field(None, ge=0, description="Return those of so many likeliest tokens.")
    include: list[str] | None = Field(None, description=f"`{LOGPROBS}`")
    metadata: dict[str, str] | None = Field(None, description="Returned as it is.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    store: bool | None = Field(None, description="Responses are not kept, whatever it says.")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="Input is never truncated.")
    previous_response_id: str | None = Field(None, description="Refused: responses are not kept.")
    conversation: str | dict[str, Any] | None = Field(None, description="Refused: conversations are not kept.")
    background: bool | None = Field(None, description="Only false.")
    prompt: dict[str, Any] | None = Field(None, description="Refused: there are no stored prompts.")
