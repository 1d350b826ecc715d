"""What all bodies are made of: their base, and types that say more than pydantic's own, with their limits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from server.limits import (
    MAX_BAD_WORD_CHARS,
    MAX_LOGIT_BIAS,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
)


class WireModel(BaseModel):
    """A JSON object from a client: no coercion ("5" is no number), unknown fields are kept to be named."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _let_others_run(cls, value: Any) -> Any:
        """Validation is one long call, within which the interpreter lets other threads run only where it comes
        to Python code: here."""
        return value


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
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
