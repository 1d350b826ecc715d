"""The forms of output that a request can ask for, under their wire names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.field_types import WireModel
from server.limits import MAX_CHOICES

JsonSchema = dict[str, Any] | bool
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]

FORM: Any = Field(description="What the output is to be. Required.")
FORM_NAME: Any = Field(None, description="The form's, which nobody is told. Default: none.")
FORM_DESCRIPTION: Any = Field(None, description="The form's, which nobody is told. Default: none.")
FORM_STRICT: Any = Field(None, description="The schema is followed either way. Default: true.")


class JsonSchemaFormat(WireModel):
    name: str | None = FORM_NAME
    description: str | None = FORM_DESCRIPTION
    json_schema: JsonSchema = Field(
        alias="schema", description="Every keyword in it is followed, or refused. Required."
    )
    strict: bool | None = FORM_STRICT


class ResponseFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"] = FORM
    json_schema: JsonSchemaFormat | None = Field(
        None, description="Of a `json_schema`. Default: none, in others."
    )
    json_object_schema: JsonSchema | None = Field(
        None,
        alias="schema",
        description="Of a `json_object`, as llama.cpp's server has it. Default: any object.",
    )


class StructuredOutputs(WireModel):
    """As vLLM has it. At most one of them may be given."""

    json_schema: dict[str, Any] | str | None = Field(
        None, alias="json", description="A JSON schema. Default: none."
    )
    regex: str | None = Field(
        None, description="What the whole text must match, in Rust's syntax. Default: none."
    )
    choice: Choices | None = Field(None, description="Texts of which the output is one. Default: none.")
    grammar: str | None = Field(None, description="In llguidance's Lark syntax, or in GBNF. Default: none.")
    json_object: bool | None = Field(None, description="Whether it is any JSON object. Default: false.")
