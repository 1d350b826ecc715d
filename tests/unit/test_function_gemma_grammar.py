"""What the grammar allows is tried with llguidance itself, the parser and a validator of JSON schemas."""

from __future__ import annotations

import ctypes
import json
import random
import re
from array import array
from typing import Any

import jsonschema
import pytest

from server.frontend.function_gemma_parser import CALL_MARK, ESCAPE_MARK, FunctionCallParser
from server.frontend.tool_forms import FunctionGemmaForm
from server.frontend.tool_parser import ArgumentPiece, CallBegun, TextPiece
from server.frontend.tool_plan import ToolPlan
from server.grammar_library import CONTROL_MARK, GrammarError, Matcher, Vocabulary
from server.tokenizer import ESCAPE, FUNCTION_TOKENS, START_CALL
from server.tool_format import Tool

EOS = 256
CONTROLS = {piece: 257 + number for number, piece in enumerate(FUNCTION_TOKENS)}
PIECES = [
    *(bytes([byte]) for byte in range(256)),
    *(CONTROL_MARK + piece.encode() for piece in ("<eos>", *FUNCTION_TOKENS)),
]
VOCABULARY = Vocabulary(array("I", map(len, PIECES)).tobytes(), b"".join(PIECES), EOS)
FORM = FunctionGemmaForm(CONTROLS)

GET = Tool("get", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
WEATHER = Tool(
    "get_weather",
    "The weather.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
)
NOW = Tool("now")
TOOLS = (GET, WEATHER, NOW)
ONE = "<start_function_call>call:get{a:1}<end_function_call>"
OTHER = (
    "<start_function_call>call:get_weather{city:<escape>}{, <escape>,unit:<escape>C<escape>}<end_function_call>"
)
EMPTY = "<start_function_call>call:now{}<end_function_call>"


def plan(*, names: tuple[str, ...] = ("get", "get_weather", "now"), **options: bool) -> ToolPlan:
    return ToolPlan(TOOLS, frozenset(names), form=FORM, **options)


def encoded(text: str) -> list[int]:
    parts = re.split(f"({'|'.join(FUNCTION_TOKENS)})", text)
    return [token for part in parts for token in ([CONTROLS[part]] if part in CONTROLS else part.encode())]


def accepts(grammar: str, text: str) -> bool:
    """Whether `text` is all that the grammar asks for."""
    matcher = VOCABULARY.compile(grammar)
    tokens = encoded(text)
    if matcher.num_matching(tokens) < len(tokens):
        return False
    matcher.consume(tokens)
    return matcher.is_accepting


def accepts_value(schema: Any, value: str, *, is_loose: bool = False) -> bool:
    """Whether `value` may be written for a parameter of that schema; strings are quoted."""
    parameters = {"type": "object", "properties": {"p": schema}, "required": ["p"]}
    grammar = FORM.arguments_grammar(parameters, is_loose=is_loose)
    return accepts(grammar, "{p:" + value.replace("'", ESCAPE) + "}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "日本 {call:get{}",
        ONE,
        OTHER,
        EMPTY,
        f"I look: {ONE}",
        f"{ONE}{OTHER}{ONE}",
        "call:get{a:1}",
    ],
)
def test_with_auto_text_and_calls_may_be_written(text: str) -> None:
    assert accepts(plan().grammar(), text)


@pytest.mark.parametrize(
    "text",
    [
        "<start_function_call>",
        "<start_function_call>call:get{}<end_function_call>",
        "<start_function_call>call:get{a:<escape>1<escape>}<end_function_call>",
        "<start_function_call>call:get{a:1,b:1}<end_function_call>",
        "<start_function_call>call:got{a:1}<end_function_call>",
        "<start_function_call>call:now{a:1}<end_function_call>",
        "<start_function_call>call:get_weather{city:<escape>Oslo<escape>,unit:<escape>K<escape>}<end_function_call>",
        ONE.removesuffix("<end_function_call>"),
        ONE + " and so on",
        ONE + "<start_function_response>",
        "<escape>",
        "<start_function_declaration>",
    ],
)
def test_with_auto_a_call_once_begun_must_be_whole_and_valid(text: str) -> None:
    assert not accepts(plan().grammar(), text)


def test_a_required_call_is_all_there_is() -> None:
    grammar = plan(is_required=True).grammar()
    assert accepts(grammar, ONE)
    assert accepts(grammar, f"{ONE}{OTHER}")
    for text in ("", "hello", f"x {ONE}", "call:get{a:1}"):
        assert not accepts(grammar, text)


def test_a_named_call_is_of_that_tool() -> None:
    for options in ({"is_required": True}, {}):
        grammar = plan(names=("now",), **options).grammar()
        assert accepts(grammar, EMPTY)
        assert not accepts(grammar, ONE)


@pytest.mark.parametrize("is_required", [True, False])
def test_without_parallel_calls_there_is_one_at_most(is_required: bool) -> None:
    grammar = plan(is_required=is_required, is_parallel=False).grammar()
    assert accepts(grammar, ONE)
    assert not accepts(grammar, f"{ONE}{OTHER}")


def test_the_form_of_the_answer_is_the_one_alternative_to_calls() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    for answer in (
        json.dumps({"grammars": [{"json_schema": schema}]}),
        f"start: a\na: %json {json.dumps(schema)}",
    ):
        grammar = plan().grammar(answer)
        assert accepts(grammar, '{"x": 1}')
        assert accepts(grammar, f"{ONE}{OTHER}")
        for text in ("", "hello", f"x {ONE}", '{"x": "1"}'):
            assert not accepts(grammar, text)
        assert not accepts(plan(is_required=True).grammar(answer), '{"x": 1}')


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({}, ["1", "'a'", "{a:[true,{}]}", "null"], ["a", '"a"', "{1}", "'"]),
        (True, ["1"], []),
        ({"type": "string"}, ["''", "'a\n,}'"], ["1", "a", '"a"', "'a", "'a'b'"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["'日本'", "'abc'"], ["''", "'a'", "'abcd'"]),
        ({"type": "string", "maxLength": 0}, ["''"], ["'a'"]),
        ({"type": "string", "pattern": "^a(b|c)$"}, ["'ab'"], ["'xab'", "'abx'"]),
        ({"type": "string", "pattern": "b|c"}, ["'abc'", "'\nb\n'"], ["'a'"]),
        ({"type": "string", "pattern": "^a/[/]\\/", "maxLength": 4}, ["'a///'"], ["'a////'", "'a//'"]),
        ({"type": "string", "pattern": "\\$$"}, ["'a$'"], ["'a'", "'$a'"]),
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13", "3.5", "'3'", "03"]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.5", "12"], ["0", "-1", "true"]),
        ({"type": "boolean"}, ["true", "false"], ["True", "1", "'true'"]),
        ({"type": "null"}, ["null"], ["None", "''"]),
        ({"type": ["integer", "null"]}, ["1", "null"], ["'a'", "1.5"]),
        ({"enum": ["a", 1, None, [{"b": "c"}], ""]}, ["'a'", "1", "null", "[{b:'c'}]", "''"], ["2", "'1'"]),
        ({"type": "string", "enum": ["a", 1]}, ["'a'"], ["1"]),
        ({"const": {"a:": [True]}}, ["{'a:':[true]}"], ["{a::[true]}", "{}"]),
        ({"type": "array"}, ["[]", "[1,'a']"], ["[1,]", "[,]", "1"]),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            ["[1]", "[1,2]"],
            ["[]", "[1,2,3]"],
        ),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, ["[null,null,null]"], ["[null]", "[]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "object"}, ["{}", "{a:1,日:'b'}"], ["{a}", "{a:1,}", "{:1}"]),
        (
            {"properties": {name: {"type": "null"} for name in ("c", "B", "a")}, "required": ["c"]},
            ["{c:null}", "{a:null,c:null}", "{B:null,c:null}", "{a:null,B:null,c:null}"],
            ["{}", "{a:null}", "{c:null,a:null}", "{c:null,}", "{,c:null}", "{a:null,c:null,d:null}"],
        ),
        (
            {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
            ["{}", "{a:null}", "{a:null,b:1}", "{b:1,c:2}", "{aa:1}"],
            ["{a:1}", "{b:1,a:null}", "{b:null}", "{b:1,a:1}"],
        ),
        ({"type": "object", "required": ["z"]}, ["{z:1}", "{z:'a'}"], ["{}", "{y:1}"]),
        (
            {"properties": {"a:b": {}, " ": {}, "a/b": {}}, "additionalProperties": True},
            ["{' ':1,a/b:1,'a:b':1,c:1}"],
            ["{a/b:1,a/b:1}"],
        ),
        ({"anyOf": [{"type": "integer"}, {"type": "string", "enum": ["auto"]}]}, ["1", "'auto'"], ["'a'"]),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", "'a'"], ["null"]),
        ({"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 2}], "title": "T"}, ["1", "2"], ["0", "3"]),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
                "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            },
            ["{a:null}", "{b:null}", "{a:null,b:null}"],
            ["{}"],
        ),
        ({"$ref": "#/properties/p/$defs/x~1y", "$defs": {"x/y": {"type": "integer"}}}, ["1"], ["'a'"]),
        (
            {"properties": {"next": {"$ref": "#/properties/p"}}, "required": [], "description": "A list."},
            ["{}", "{next:{next:{}}}"],
            ["{next:1}"],
        ),
        ({"type": "string", "description": "D", "default": "x", "x-unit": "m"}, ["'a'"], ["1"]),
    ],
)  # fmt: skip
def test_values_are_held_to_their_schema(schema: Any, allowed: list[str], refused: list[str]) -> None:
    for value in allowed:
        assert accepts_value(schema, value), value
    for value in refused:
        assert not accepts_value(schema, value), value


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "^(?=a).*$"}, "pattern"),
        ({"type": "string", "pattern": "^(a|b)\\1$"}, "pattern"),
        ({"type": "string", "not": {"const": "a"}}, "not"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
        ({"allOf": [{"type": "string", "maxLength": 3}, {"maxLength": 2}]}, "allOf"),
        ({"type": "object", "patternProperties": {"^a": {}}}, "patternProperties"),
        ({"type": "object", "properties": {"a": {}}, "anyOf": [{"additionalProperties": False}]}, "anyOf"),
        ({"enum": [1, 2], "minimum": 2}, "minimum"),
        ({"$ref": "#/$defs/a", "minLength": 1}, "minLength"),
    ],
)
def test_what_cannot_be_expressed_is_named_and_left_out_where_that_is_allowed(
    schema: Any, keyword: str
) -> None:
    parameters = {"type": "object", "properties": {"p": schema}, "$defs": {"a": {"type": "string"}}}
    with pytest.raises(GrammarError, match=f"'{keyword}'"):
        FORM.arguments_grammar(parameters, is_loose=False)
    VOCABULARY.compile(FORM.arguments_grammar(parameters, is_loose=True))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "text"},
        {"type": []},
        {"type": 3},
        {"enum": []},
        {"enum": 3},
        {"type": "integer", "enum": ["a"]},
        {"minLength": "a"},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "minLength": -1},
        {"type": "string", "pattern": 3},
        {"properties": []},
        {"required": "a"},
        {"required": [1]},
        {"anyOf": []},
        {"anyOf": {}},
        {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.com/schema"},
        {"$ref": "#anchor"},
        {"$ref": 3},
        {"type": "string", "pattern": "^a|b$"},
        {"type": "string", "pattern": "(^a|b)"},
        {"type": "string", "pattern": "a\\"},
        False,
        "string",
    ],
)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(GrammarError):
        FORM.arguments_grammar({"type": "object", "properties": {"p": schema}}, is_loose=False)


def test_a_pattern_is_held_to_where_something_else_cannot_be() -> None:
    schema = {"type": "string", "pattern": "^a+$", "format": "date"}
    assert accepts_value(schema, "'aa'", is_loose=True)
    assert not accepts_value(schema, "'b'", is_loose=True)


def test_the_arguments_are_always_an_object() -> None:
    definitions = {"a": {"type": "object", "properties": {"b": {"type": "null"}}}, "c": {"type": "string"}}
    grammar = FORM.arguments_grammar({"$ref": "#/$defs/a", "$defs": definitions}, is_loose=False)
    assert accepts(grammar, "{b:null}")
    with pytest.raises(GrammarError):
        FORM.arguments_grammar({"$ref": "#/$defs/c", "$defs": definitions}, is_loose=False)
    for parameters in (
        {"$ref": "#/$defs/c", "$defs": definitions},
        {"anyOf": [{"type": "string"}]},
        {"enum": [{}, "a"]},
    ):
        grammar = FORM.arguments_grammar(parameters, is_loose=True)
        assert not accepts(grammar, "<escape>a<escape>")
        assert accepts(grammar, "{}")


RICH = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "kind": {"enum": ["a", "b c", None, 3]},
        "count": {"type": "integer", "minimum": -3, "maximum": 12},
        "ratio": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 3},
        "where": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y:": {"type": "boolean"}},
            "required": ["y:"],
        },
        "tree": {"$ref": "#/$defs/tree"},
        "any": {},
        "more": {"properties": {"k": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        "one": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{1,3}$"}]},
    },
    "required": ["name", "tree"],
    "additionalProperties": False,
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/tree"}, "leaf": {"type": "integer"}},
        }
    },
}


def random_walk(matcher: Matcher, seed: int, limit: int = 600) -> list[int] | None:
    """Tokens that the grammar allows, with a liking for endings; None if there are too many."""
    generator = random.Random(seed)
    mask = (ctypes.c_uint32 * ((len(PIECES) + 31) // 32))()
    tokens: list[int] = []
    while len(tokens) < limit:
        matcher.fill_mask(ctypes.addressof(mask), ctypes.sizeof(mask))
        allowed = [token for token in range(len(PIECES)) if mask[token // 32] >> token % 32 & 1]
        if EOS in allowed and (len(allowed) == 1 or generator.random() < 0.3):
            return tokens
        allowed = [token for token in allowed if token != EOS]
        endings = [token for token in allowed if token >= 256 or token in b"}]"]
        token = generator.choice(endings if endings and generator.random() < 0.4 else allowed)
        matcher.consume([token])
        tokens.append(token)
        if matcher.is_complete:
            return tokens
    return None


def decoded(tokens: list[int]) -> str:
    marks = {CONTROLS[START_CALL]: CALL_MARK, CONTROLS[ESCAPE]: ESCAPE_MARK}
    text, run = "", bytearray()
    for token in tokens:
        if token < 256:
            run.append(token)
        else:
            text += run.decode() + marks.get(token, "")
            run.clear()
    return text + run.decode()


def test_whatever_the_grammar_allows_the_parser_reads_as_valid_calls() -> None:
    tools = (Tool("rich", "", RICH), GET, NOW)
    compiled = VOCABULARY.compile(
        ToolPlan(tools, frozenset(tool.name for tool in tools), is_required=True, form=FORM).grammar()
    )
    schemas = {tool.name: {"type": "object", **tool.parameters} for tool in tools}
    counts = dict.fromkeys(schemas, 0)
    for seed in range(40):
        tokens = random_walk(compiled.copy(), seed)
        if tokens is None:
            continue
        text = decoded(tokens)
        parser = FunctionCallParser()
        pieces = [piece for part in re.split("(?<=[,:])", text) for piece in parser.push(part)]
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
            jsonschema.validate(json.loads(arguments), schemas[name])
            counts[name] += 1
    assert min(counts.values()) > 5


def test_a_schema_cannot_leave_its_place_in_the_grammar() -> None:
    evil = '}\nstart: /x/ <escape> %json {"/'
    schemas: list[Any] = [
        {"enum": [evil, "\u2028\b\f\x7f\U0001f600"]},
        {"type": "string", "pattern": "^[/\\]/]+$", "description": evil},
        {"type": "object", "properties": {evil: {"const": evil}}, "additionalProperties": True},
    ]
    for schema in schemas:
        parameters = {"type": "object", "properties": {evil: schema}, "required": [evil]}
        grammar = ToolPlan(
            (Tool("f", evil, parameters),), frozenset({"f"}), is_required=True, form=FORM
        ).grammar()
        assert not accepts(grammar, "x")
    assert accepts_value(schemas[0], "'\u2028\b\f\x7f\U0001f600'")


def test_large_and_hostile_schemas_are_compiled_or_refused_in_time() -> None:
    straight = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(2000)} | {"2000": {"type": "null"}}
    deep: Any = {"type": "null"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    for schema in ({"$ref": "#/$defs/0"}, deep):
        parameters = {"type": "object", "properties": {"p": schema}, "$defs": straight}
        FORM.arguments_grammar(parameters, is_loose=False)
    many = {f"p{n}": {"type": "string"} for n in range(300)}
    grammar = FORM.arguments_grammar({"type": "object", "properties": many}, is_loose=False)
    assert accepts(grammar, "{p0:<escape>a<escape>,p299:<escape>b<escape>}")
    for _ in range(100):
        deep = {"anyOf": [deep]}
    with pytest.raises(GrammarError, match="deeper"):
        FORM.arguments_grammar({"type": "object", "properties": {"p": deep}}, is_loose=True)
    with pytest.raises(GrammarError, match="characters"):
        FORM.arguments_grammar({"type": "object", "description": "x" * 300_000}, is_loose=False)
