"""The forms of output that a request can ask for, under their wire names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 10_000

JsonSchema = dict[str, Any] | bool
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), allow_inf_nan=False)


class JsonSchemaFormat(_Form):
    name: str | None = None
    description: str | None = None
    json_schema: JsonSchema = Field(alias="schema", description="Every keyword in it is followed, or refused.")
    strict: bool | None = Field(None, description="The schema is followed either way.")


class ResponseFormat(_Form):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    json_object_schema: JsonSchema | None = Field(
        None, alias="schema", description="Of a `json_object`, as llama.cpp's server has it."
    )


class StructuredOutputs(_Form):
    """As vLLM has it. At most one of them may be given."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = Field(None, description="What the whole text must match, in Rust's syntax.")
    choice: Choices | None = Field(None, description="Texts of which the output is one.")
    grammar: str | None = Field(None, description="In llguidance's Lark syntax, or in GBNF.")
    json_object: bool | None = Field(None, description="Any JSON object.")
