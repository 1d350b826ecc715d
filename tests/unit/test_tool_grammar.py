"""The grammar is tried against llguidance itself, byte by byte, and against the parser."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLMatcher

from server.frontend.tool_grammar import arguments_grammar
from server.frontend.tool_parser import ArgumentPiece, CallBegun, CallParser, TextPiece
from server.frontend.tool_plan import ToolPlan
from server.tool_format import Tool, ToolCall, call_text
from tests.grammars import BYTES, accepts

GET = Tool("get", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
WEATHER = Tool(
    "get_weather",
    "The weather.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
)
NOW = Tool("now")
TOOLS = (GET, WEATHER, NOW)


def plan(*, names: tuple[str, ...] = ("get", "get_weather", "now"), **options: bool) -> ToolPlan:
    return ToolPlan(TOOLS, frozenset(names), **options)


ONE = call_text(ToolCall("", "get", '{"a": 1}'))
OTHER = call_text(ToolCall("", "get_weather", '{"city": "Oslo", "unit": "C"}'))
EMPTY = call_text(ToolCall("", "now", ""))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "日本 ```json\n{}\n```",
        '{"name": "Bob", "parameters": 3}',
        '{"name": "get',
        ONE,
        OTHER,
        EMPTY,
        f"I look: {ONE}",
        f"```json\n{OTHER}\n```",
        '{\n  "name": "get",\n  "parameters": {\n    "a": 12\n  }\n}',
        f"{ONE}\n{OTHER}\n",
        f"[{ONE}, {ONE}]",
        f"```json\n{ONE}\n```\n```json\n{EMPTY}\n```",
    ],
)
def test_with_auto_text_and_calls_may_be_written(text: str) -> None:
    assert accepts(plan().grammar(), text)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get"',
        '{"name": "get"}',
        '{"name": "get", "parameters": {}}',
        '{"name": "get", "parameters": {"a": "1"}}',
        '{"name": "get", "parameters": {"a": 1, "invented": 1}}',
        '{"name": "now", "parameters": {"a": 1}}',
        '{"name": "get_weather", "parameters": {"city": "Oslo", "unit": "K"}}',
        ONE[:-1],
        ONE + " and so on",
    ],
)
def test_with_auto_a_call_once_begun_must_be_whole_and_valid(text: str) -> None:
    assert not accepts(plan().grammar(), text)


def test_a_required_call_is_all_there_is() -> None:
    grammar = plan(is_required=True).grammar()
    assert accepts(grammar, ONE)
    assert accepts(grammar, f"{ONE}\n{OTHER}")
    for text in ("", "hello", f"x {ONE}", '{"name": "Bob"}'):
        assert not accepts(grammar, text)


def test_a_named_call_is_of_that_tool() -> None:
    grammar = plan(names=("now",), is_required=True).grammar()
    assert accepts(grammar, EMPTY)
    assert not accepts(grammar, ONE)
    # What is not allowed is text like any other where text may be written.
    assert accepts(plan(names=("now",)).grammar(), ONE)


@pytest.mark.parametrize("is_required", [True, False])
def test_without_parallel_calls_there_is_one_at_most(is_required: bool) -> None:
    grammar = plan(is_required=is_required, is_parallel=False).grammar()
    assert accepts(grammar, ONE)
    assert not accepts(grammar, f"{ONE}\n{OTHER}")


def random_text(grammar: str | None, seed: int, limit: int = 3000) -> str | None:
    """A walk over the bytes that the grammar allows, printable ones mostly; None if it is too long."""
    assert grammar is not None
    generator = random.Random(seed)
    matcher = LLMatcher(BYTES, grammar)
    data = bytearray()
    while len(data) < limit:
        bias = matcher.compute_logit_bias()
        allowed = [token for token in range(len(bias)) if bias[token] and token < 256]
        if matcher.is_accepting() and (not allowed or generator.random() < 0.05):
            return data.decode(errors="strict")
        endings = [byte for byte in allowed if byte in b'"}']
        byte = generator.choice(endings if endings and generator.random() < 0.3 else allowed)
        assert matcher.consume_token(byte)
        data.append(byte)
    return None


@pytest.mark.parametrize("is_parallel", [True, False])
def test_whatever_the_grammar_allows_the_parser_reads_as_valid_calls(is_parallel: bool) -> None:
    num_calls = 0
    for seed in range(60):
        try:
            text = random_text(plan(is_required=True, is_parallel=is_parallel).grammar(), seed)
        except UnicodeDecodeError:
            continue  # the walk ended within a character
        if text is None:
            continue
        parser = CallParser(plan().names)
        pieces = parser.push(text) + parser.finish()
        assert parser.has_whole_calls
        calls: list[list[str]] = []
        for piece in pieces:
            match piece:
                case CallBegun(_, _, name):
                    calls.append([name, ""])
                case ArgumentPiece(_, part):
                    calls[-1][1] += part
                case TextPiece(part):
                    pytest.fail(f"text: {part!r}")
        for name, arguments in calls:
            assert_valid(name, json.loads(arguments))
        assert is_parallel or len(calls) == 1
        num_calls += len(calls)
    assert num_calls > 30


def assert_valid(name: str, arguments: Any) -> None:
    match name:
        case "get":
            assert set(arguments) == {"a"}
            assert isinstance(arguments["a"], int)
        case "get_weather":
            assert set(arguments) == {"city", "unit"}
            assert len(arguments["city"]) <= 8
            assert arguments["unit"] in ("C", "F")
        case "now":
            assert arguments == {}


def test_the_form_of_the_answer_is_the_one_alternative_to_calls() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    for answer in (
        json.dumps({"grammars": [{"json_schema": schema}]}),
        f"start: a\na: %json {json.dumps(schema)}",
    ):
        grammar = plan().grammar(answer)
        assert accepts(grammar, '{"x": 1}')
        assert accepts(grammar, ONE)
        assert accepts(grammar, f"{ONE}\n{OTHER}")
        for text in ("", "hello", f"x {ONE}", '{"x": "1"}'):
            assert not accepts(grammar, text)
        assert not accepts(plan(is_required=True).grammar(answer), '{"x": 1}')


def test_what_no_grammar_can_express_is_left_out_where_that_is_allowed() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    assert LLMatcher.validate_grammar(arguments_grammar(parameters, is_loose=False))
    assert accepts(arguments_grammar(parameters, is_loose=True), '{"a": [1, 1]}')
    assert not accepts(arguments_grammar(parameters, is_loose=True), '{"a": 1}')
    assert accepts(arguments_grammar(WEATHER.parameters, is_loose=False), '{"city": "Oslo", "unit": "C"}')


def test_arguments_may_be_anything_where_the_schema_leaves_them_open() -> None:
    for parameters in (
        {"type": "object"},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"anyOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {}}}]},
    ):
        grammar = ToolPlan((Tool("f", "", parameters),), frozenset({"f"}), is_required=True).grammar()
        assert accepts(grammar, '{"name": "f", "parameters": {"z": [1, {}]}}')


def test_a_schema_cannot_leave_its_place_in_the_grammar() -> None:
    parameters = {
        "type": "object",
        "properties": {'}\nstart: /x/ %json {"': {"enum": ["}\nTEXT: /.*/", "é\u2028"]}},
    }
    tool = Tool("f", '"\n', parameters)
    grammar = ToolPlan((tool,), frozenset({"f"}), is_required=True).grammar()
    assert not accepts(grammar, "x")
    assert accepts(grammar, call_text(ToolCall("", "f", "{}")))
