"""What a request says about the form of its output, as what the engine holds its tokens to.

Three ways ask for a form: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`
fields, which mean the same. A request may use one of them, for one form.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from server.api.formats import ResponseFormat, StructuredOutputs
from server.api.prompts import INLINE_CHARS
from server.api.protocol import GenerationFields
from server.errors import InvalidRequestError
from server.frontend.fitting import check_token_ids
from server.frontend.grammar_check import GrammarChecker
from server.frontend.grammar_worker import Question, Syntax
from server.frontend.served_model import ServedModel
from server.grammar_library import JSON_WHITESPACE, MAX_GRAMMAR_CHARS, GrammarError, quoted
from server.tokenizer import InvalidTextError, Tokenizer

_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_IN_OUR_WORDS = {
    "Unimplemented keys:": "unsupported keywords:",
    "NoExtensionBias": "no text matches it",
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        "'oneOf' is supported only where its branches cannot overlap; 'anyOf' always is"
    ),
}
_LONGEST_MESSAGE = 300
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class OutputConstraints:
    """Fields of SamplingParams."""

    grammar: str | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


async def output_constraints(
    body: GenerationFields, model: ServedModel, grammars: GrammarChecker
) -> OutputConstraints:
    """Raises InvalidRequestError, for a grammar that does not compile among others, and QueueFullError."""
    allowed = tuple(dict.fromkeys(body.allowed_token_ids or ()))
    check_token_ids(allowed, model.info, "allowed_token_ids")
    wanted = list(_wanted(body))
    if len(wanted) > 1:
        names = f"'{wanted[0].param}' and '{wanted[1].param}'"
        raise InvalidRequestError(
            f"{names} both ask for a form of the output; only one may.", param=wanted[1].param
        )
    return OutputConstraints(
        grammar=await check_grammar(wanted[0].question, grammars, wanted[0].param) if wanted else None,
        allowed_token_ids=allowed,
        bad_words=await _bad_words(body.bad_words or [], model.tokenizer),
    )


async def check_grammar(question: Question, grammars: GrammarChecker, param: str) -> str:
    """The grammar for SamplingParams. Raises InvalidRequestError that names `param`, and QueueFullError."""
    with refusing(param):
        return await grammars.check(question)


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Turns a GrammarError into an InvalidRequestError that names `param`."""
    try:
        yield
    except GrammarError as error:
        message = " ".join(str(error)[: 2 * _LONGEST_MESSAGE].split())
        for theirs, ours in _IN_OUR_WORDS.items():
            message = message.replace(theirs, ours)
        if len(message) > _LONGEST_MESSAGE:
            message = message[: _LONGEST_MESSAGE - 3] + "..."
        raise InvalidRequestError(f"'{param}' cannot be used: {message}.", param=param) from None


def json_grammar(schema: Mapping[str, Any]) -> str:
    """A grammar of the JSON texts that match a JSON schema."""
    options = {"whitespace_pattern": JSON_WHITESPACE}
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": options}}]}, ensure_ascii=False)


def choice_grammar(choices: list[str]) -> str:
    """A grammar of these texts."""
    return "start: " + " | ".join(map(quoted, choices))


@dataclass(frozen=True, slots=True)
class _Wanted:
    param: str
    question: Question


def _wanted(body: GenerationFields) -> Iterator[_Wanted]:
    if body.response_format is not None:
        yield from _of_response_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_structured_outputs(body.structured_outputs, "structured_outputs.{}")
    guided = StructuredOutputs.model_construct(
        json_schema=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
        json_object=body.guided_json_object,
    )
    yield from _of_structured_outputs(guided, "guided_{}")


def _of_response_format(wanted: ResponseFormat) -> Iterator[_Wanted]:
    for name, value, kind in (
        ("json_schema", wanted.json_schema, "json_schema"),
        ("schema", wanted.json_object_schema, "json_object"),
    ):
        if value is not None and wanted.type != kind:
            param = f"response_format.{name}"
            raise InvalidRequestError(
                f"'{param}' goes with the type {kind!r}, not {wanted.type!r}.", param=param
            )
    match wanted.type:
        case "json_object":
            schema = wanted.json_object_schema
            param = "response_format" if schema is None else "response_format.schema"
            yield _Wanted(param, _of_schema(_ANY_OBJECT if schema is None else schema, param))
        case "json_schema":
            if wanted.json_schema is None:
                raise InvalidRequestError(
                    "'response_format.json_schema' is required where the type is 'json_schema'.",
                    param="response_format.json_schema",
                    code="missing_required_parameter",
                )
            param = "response_format.json_schema.schema"
            yield _Wanted(param, _of_schema(wanted.json_schema.json_schema, param))


def _of_structured_outputs(wanted: StructuredOutputs, name: str) -> Iterator[_Wanted]:
    if wanted.json_schema is not None:
        param = name.format("json")
        yield _Wanted(param, _of_schema(wanted.json_schema, param))
    if wanted.regex is not None:
        yield _Wanted(name.format("regex"), Question(wanted.regex, Syntax.REGEX))
    if wanted.choice is not None:
        param = name.format("choice")
        # Looked at here, since already to write such a grammar takes long.
        if (size := sum(map(len, wanted.choice))) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"'{param}' has texts of {size} characters; at most {MAX_GRAMMAR_CHARS} are allowed.",
                param=param,
            )
        yield _Wanted(param, Question(choice_grammar(wanted.choice)))
    if wanted.grammar is not None:
        syntax = Syntax.GBNF if _GBNF_RULE.search(wanted.grammar) else Syntax.NATIVE
        yield _Wanted(name.format("grammar"), Question(wanted.grammar, syntax))
    if wanted.json_object:
        yield _Wanted(name.format("json_object"), Question(json_grammar(_ANY_OBJECT)))


def _of_schema(schema: object, param: str) -> Question:
    if isinstance(schema, str):
        try:
            schema = from_json(schema, allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequestError(f"'{param}' is not valid JSON: {error}.", param=param) from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"'{param}' must be a JSON schema, which is an object.", param=param)
    return Question(json_grammar(schema))


async def _bad_words(words: list[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelt at the start of a text, and behind a space; spaces alone as they are."""

    def encode() -> tuple[tuple[int, ...], ...]:
        bare = ((word, word.lstrip(" ")) for word in words)
        spelt = (text for word, rest in bare for text in ((rest, f" {rest}") if rest else (word,)))
        return tuple(dict.fromkeys(tuple(tokenizer.encode_text(text)) for text in spelt))

    try:
        is_short = sum(map(len, words)) <= INLINE_CHARS
        return encode() if is_short else await asyncio.to_thread(encode)
    except InvalidTextError as error:
        raise InvalidRequestError(f"'bad_words': {error}", param="bad_words") from None
