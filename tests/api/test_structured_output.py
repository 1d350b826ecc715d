"""The ways to ask for a form of output, up to the grammar that the engine is given."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import Any

import pytest

from server.frontend.vocabulary import make_vocabulary
from server.grammar_library import Vocabulary
from tests.api.support import TOKENIZER, VOCAB_SIZE, LiveServer, assert_error, chunks, live_server

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
_MESSAGE = make_vocabulary(TOKENIZER, VOCAB_SIZE)
VOCABULARY = Vocabulary(_MESSAGE.lengths, _MESSAGE.pieces, _MESSAGE.eos_token_id)


def has(grammar: str, text: str) -> bool:
    """Whether the text is one of the grammar's, byte for byte."""
    matcher = VOCABULARY.compile(grammar)
    ids = [8 + byte for byte in text.encode()]
    return matcher.num_matching(ids) == len(ids) and not matcher.consume(ids) and matcher.is_accepting


def grammar_of(server: LiveServer, **fields: Any) -> str:
    """What the engine gets, from both routes."""
    for response in (server.chat("ab", max_tokens=3, **fields), server.complete("ab", max_tokens=3, **fields)):
        assert response.status_code == 200, response.text
        assert "x-ignored-fields" not in response.headers
    chat, completion = (request.params.grammar for request in server.engine.submitted)
    server.engine.submitted.clear()
    assert chat is not None
    assert chat == completion
    return chat


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON, "strict": False, "description": "x"},
            }
        },
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON), "regex": None}},
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"guided_json": {**PERSON, "x-guidance": {"lenient": True, "whitespace_pattern": "[ ]+"}}},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_a_schema_is_followed_however_it_comes(server: LiveServer, fields: dict[str, Any]) -> None:
    grammar = grammar_of(server, **fields)
    assert has(grammar, '{"name": "日\\n", "age": -3}')
    assert has(grammar, '{"name":"x"}')
    assert has(grammar, '{\n    "name": "x",\n    "age": 3\n}'), "models like to indent"
    assert not has(grammar, '{"age": 3}')
    assert not has(grammar, '{"name": "x", "age": "3"}')
    assert not has(grammar, '{"name": "x", "other": 3}')
    assert not has(grammar, '{"name":\n\n"x"}'), "a model may repeat line feeds for ever"
    assert not has(grammar, '{"name":' + " " * 30 + '"x"}')
    assert not has(grammar, '{"name": "x"} ')


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"guided_json_object": True},
    ],
)
def test_a_json_object_is_any_object(server: LiveServer, fields: dict[str, Any]) -> None:
    grammar = grammar_of(server, **fields)
    assert has(grammar, '{"a": [1, {"b": null}], "c": "x"}')
    assert has(grammar, "{}")
    assert not has(grammar, "[]")
    assert not has(grammar, '{"a"}')


@pytest.mark.parametrize("name", ["structured_outputs.{}", "guided_{}"])
def test_regexes_choices_and_grammars_are_followed(server: LiveServer, name: str) -> None:
    def asked(kind: str, value: object) -> str:
        outer, _, inner = name.format(kind).partition(".")
        return grammar_of(server, **{outer: {inner: value} if inner else value})

    regex = asked("regex", r"^\d{3}/[a-c]+\.$")
    assert has(regex, "123/abc.")
    assert not has(regex, "123/abc")
    assert not has(regex, "x123/abc.")

    texts = ['say "x"', "a\\b\n/", "日😀", "'", "a|b", ""]
    choice = asked("choice", texts)
    assert all(has(choice, text) for text in texts)
    assert not has(choice, "a")
    assert not has(choice, "日")

    lark = asked("grammar", 'start: "(" start ")" | "x"')
    assert has(lark, "((x))")
    assert not has(lark, "((x)")
    assert has(asked("grammar", 'start: "a ::= b"'), "a ::= b")

    gbnf = asked("grammar", 'root ::= "a" [0-9]+ ws\nws ::= [ \\t]*')
    assert has(gbnf, "a12 ")
    assert not has(gbnf, "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
        {"structured_outputs": None},
        {"structured_outputs": {"json_object": False}},
        {"guided_json_object": False},
        {"guided_json": None},
    ],
)
def test_what_asks_for_nothing_constrains_nothing(server: LiveServer, fields: dict[str, Any]) -> None:
    assert server.chat("ab", max_tokens=3, **fields).status_code == 200
    (request,) = server.engine.submitted
    assert request.params.grammar is None


def test_unknown_parts_of_a_form_are_named(server: LiveServer) -> None:
    form = {"regex": "a", "disable_any_whitespace": True}
    response = server.chat("ab", max_tokens=3, structured_outputs=form)
    assert response.headers["x-ignored-fields"] == "structured_outputs.disable_any_whitespace"


def test_every_choice_and_prompt_has_the_grammar(server: LiveServer) -> None:
    body = {"n": 2, "max_tokens": 2, "structured_outputs": {"regex": "a+"}}
    assert server.complete(["a", "b"], **body).status_code == 200
    assert len({request.params.grammar for request in server.engine.submitted}) == 1
    assert len(server.engine.submitted) == 4


@pytest.mark.covers("R27")
@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "then"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "array", "contains": {"type": "string"}}, "contains"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
    ],
)
def test_a_keyword_that_cannot_be_followed_is_named(
    server: LiveServer, schema: dict[str, Any], keyword: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        response = server.chat("ab", response_format=form, stream=stream)
        message = assert_error(response, 400, param="response_format.json_schema.schema")
        assert keyword in message
    assert server.engine.submitted == []


@pytest.mark.covers("R27")
@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {"$ref": "#"}},
        {
            "guided_json": {
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                "$ref": "#/$defs/a",
            }
        },
        {"structured_outputs": {"json": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}},
    ],
)
def test_a_form_that_no_text_has_is_refused(server: LiveServer, fields: dict[str, Any]) -> None:
    assert "no text matches it" in assert_error(server.chat("ab", **fields), 400)


def chain(count: int) -> str:
    links = "\n".join(f"R{number}: R{number + 1}" for number in range(count))
    return f'start: R0\n{links}\nR{count}: "a"'


HOSTILE: dict[str, dict[str, Any]] = {
    "recursion that fills the stack": {"structured_outputs": {"grammar": chain(12_000)}},
    "ten thousand brackets": {"structured_outputs": {"regex": "(" * 10_000 + "a" + ")" * 10_000}},
    "ten thousand levels": {"guided_json": '{"items":' * 10_000 + "{}" + "}" * 10_000},
    "terminals that double": {
        "guided_grammar": "start: R0\n"
        + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40))
        + '\nR40: "a"'
    },
    "a megabyte": {"guided_json": {"type": "string", "description": "x" * 1_000_000}},
    "a huge enum": {"guided_json": {"enum": [f"value {number}" for number in range(100_000)]}},
    "years of compiling": {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(8000)}}},
    "a product of unions": {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"const": j}}} for j in range(10)]} for i in range(10)
            ]
        }
    },
}


@pytest.mark.covers("E09", "R27")
@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_grammar_is_refused_soon_and_holds_nobody_up(
    server: LiveServer, fields: dict[str, Any]
) -> None:
    grammar_of(server, guided_regex="warm")
    slowest = 0.0
    refused = threading.Event()

    def watch() -> None:
        nonlocal slowest
        while not refused.is_set():
            started = time.monotonic()
            assert server.http.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        assert_error(server.chat("ab", **fields), 400)
    finally:
        refused.set()
        watcher.join()
    assert time.monotonic() - started < 6
    assert slowest < 1
    assert server.engine.submitted == []
    assert has(grammar_of(server, guided_regex="still a+"), "still aa")


def test_a_checker_that_was_killed_is_started_again(server: LiveServer) -> None:
    grammar_of(server, guided_regex="a")
    process = server.runtime.grammars._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert has(grammar_of(server, guided_regex="ab"), "ab")


def test_too_many_grammars_at_once_are_refused_with_429(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar_of(server, guided_regex="a")
    monkeypatch.setattr("server.frontend.grammar_check._MAX_WAITING", 0)
    assert_error(server.chat("ab", guided_regex="new"), 429, code="queue_full")
    assert server.chat("ab", guided_regex="a").status_code == 200, "known ones need no checker"
    server.assert_idle()


@pytest.mark.covers("R28")
def test_the_checker_forgets_what_was_asked_for_longest_ago(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.frontend.grammar_check._CACHED", 3)
    for number in range(6):
        grammar_of(server, guided_regex=f"a{number}")
    assert len(server.runtime.grammars._cache) == 3


def test_no_checker_runs_until_there_is_a_grammar() -> None:
    with live_server() as server:
        assert server.chat("ab").status_code == 200
        assert server.runtime.grammars._process is None


def test_bad_words_are_spelt_with_and_without_a_space_and_allowed_ids_go_as_they_are(
    server: LiveServer,
) -> None:
    response = server.chat("ab", max_tokens=2, bad_words=["model", " ab", "ab"], allowed_token_ids=[9, 7, 9])
    assert response.status_code == 200
    (request,) = server.engine.submitted
    spelt = {tuple(TOKENIZER.encode_text(text)) for text in ("model", " model", "ab", " ab")}
    assert set(request.params.bad_words) == spelt
    assert len(request.params.bad_words) == 4
    assert request.params.allowed_token_ids == (9, 7)


def test_a_bad_word_of_spaces_is_what_it_is_and_never_nothing(server: LiveServer) -> None:
    assert server.chat("ab", max_tokens=2, bad_words=[" ", "   "]).status_code == 200
    (request,) = server.engine.submitted
    assert request.params.bad_words == tuple(tuple(TOKENIZER.encode_text(text)) for text in (" ", "   "))


def test_a_stream_with_a_form_is_the_whole_answer(server: LiveServer) -> None:
    fields: dict[str, Any] = {"max_tokens": 9, "response_format": {"type": "json_object"}, "seed": 1}
    whole = server.chat("ab", **fields).json()["choices"][0]["message"]["content"]
    parts = chunks(server.chat("ab", stream=True, **fields))
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == whole
