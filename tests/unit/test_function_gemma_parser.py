from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat_template import ChatMessage, ControlToken
from server.engine.types import FinishReason, SequenceOutput
from server.frontend.function_gemma_parser import (
    CALL_MARK,
    ESCAPE_MARK,
    FunctionCallFinder,
    FunctionCallParser,
)
from server.frontend.request_state import RequestState, StopConditions
from server.frontend.tool_forms import form_of
from server.frontend.tool_parser import ArgumentPiece, CallBegun, Piece, TextPiece
from server.frontend.tool_plan import ToolPlan
from server.function_gemma_template import render_function_chat
from server.tokenizer import ESCAPE, START_CALL
from server.tool_format import Tool, ToolCall
from tests.fixtures_tokenizers import make_function_tokenizer

TOKENIZER = make_function_tokenizer()
FORM = form_of(TOKENIZER)
ONE = "<start_function_call>call:get{city:<escape>Paris<escape>,days:3}<end_function_call>"
EMPTY = "<start_function_call>call:now{}<end_function_call>"
NESTED = (
    "<start_function_call>call:a-b{list:[<escape>}]{,:<escape>,-1.5e3,true,[{x y:null}]],"
    '<escape>k:"1<escape>:<escape>"\\\n日<escape>}<end_function_call>'
)
NESTED_VALUE = {"list": ["}]{,:", -1.5e3, True, [{"x y": None}]], 'k:"1': '"\\\n日'}


def marked(text: str) -> str:
    """As it comes from the detokenizer."""
    text = text.replace("<start_function_call>", CALL_MARK).replace("<escape>", ESCAPE_MARK)
    return text.replace("<end_function_call>", "")


def collect(pieces: Sequence[Piece]) -> tuple[str, list[tuple[str, str]]]:
    text, calls = "", []
    for piece in pieces:
        match piece:
            case TextPiece(part):
                assert part
                assert not calls, "text after a call"
                text += part
            case CallBegun(index, _, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ArgumentPiece(index, part):
                assert part
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + part)
    return text, calls


def parse(parts: Sequence[str]) -> tuple[str, list[tuple[str, str]], bool]:
    """The text, the calls' names and arguments, and whether all are whole."""
    parser = FunctionCallParser()
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    return *collect(pieces), parser.has_whole_calls


@pytest.mark.parametrize(
    ("text", "expected_text", "expected_calls"),
    [
        ("", "", []),
        ('hello {"a": call:get{}}', 'hello {"a": call:get{}}', []),
        (ONE, "", [("get", {"city": "Paris", "days": 3})]),
        ("I look.\n" + EMPTY, "I look.\n", [("now", {})]),
        (ONE + NESTED + " and " + EMPTY + "x", "", [("get", ...), ("a-b", NESTED_VALUE), ("now", {})]),
        ("a<escape>b" + EMPTY, "ab", [("now", {})]),
    ],
)
def test_calls_are_read_as_json_however_the_text_is_cut(
    text: str, expected_text: str, expected_calls: list[tuple[str, Any]]
) -> None:
    text = marked(text)
    for cut in range(len(text) + 1):
        found, calls, is_whole = parse([text[:cut], text[cut:]])
        assert found == expected_text
        assert is_whole == bool(expected_calls)
        for (name, arguments), (expected_name, expected) in zip(calls, expected_calls, strict=True):
            assert name == expected_name
            assert json.loads(arguments) == expected or expected is ...
    assert parse(list(text)) == parse([text])


def test_every_beginning_of_a_call_is_the_beginning_of_its_json() -> None:
    text = marked(NESTED)
    whole = parse([text])[1][0][1]
    for length in range(len(text)):
        found, calls, is_whole = parse([text[:length]])
        assert found == ""
        assert not calls or whole.startswith(calls[0][1])
        assert is_whole == (bool(calls) and calls[0][1] == whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4), st.data())
def test_what_the_template_writes_of_arguments_is_read_as_the_same(value: Any, data: st.DataObject) -> None:
    call = ToolCall("a", "get", json.dumps(value))
    chat = render_function_chat([ChatMessage("assistant", "", (call,))], TOKENIZER, add_generation_prompt=False)
    marks = {START_CALL: CALL_MARK, ESCAPE: ESCAPE_MARK}
    written = "".join(
        marks.get(segment.piece, "") if isinstance(segment, ControlToken) else segment
        for segment in chat.segments[3:]
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=6)))
    parts = [written[start:end] for start, end in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    text, [(name, arguments)], is_whole = parse(parts)
    assert (text, name, is_whole) == ("", "get", True)
    assert json.loads(arguments) == value


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([CALL_MARK, ESCAPE_MARK, *"{}[],: \n", "call:", "get", '"', "\\", "1"]), max_size=20
    )
)
def test_no_text_is_too_wild_to_be_read(fragments: list[str]) -> None:
    text, calls, _ = parse(fragments)
    for part in (text, *(part for call in calls for part in call)):
        part.encode()  # has no marks


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        ESCAPE_MARK * 50_000,
        CALL_MARK * 50_000,
        CALL_MARK + "call:" + "a" * 100_000,
        CALL_MARK + "call:f" + "{" * 30_000,
        CALL_MARK + "call:f{a:" + "[" * 30_000,
        CALL_MARK + "call:f{a:" + ESCAPE_MARK + '"' * 100_000,
        CALL_MARK + "call:f{" + "a:1," * 20_000,
    ],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    start = time.process_time()
    parse([text])
    parse([text[i : i + 7] for i in range(0, len(text), 7)])
    assert time.process_time() - start < 10


def test_the_finder_knows_where_text_ends() -> None:
    finder = FunctionCallFinder()
    assert finder.text_end("abc") is None
    assert finder.text_end("de" + CALL_MARK + "call") == 2


PLAN = ToolPlan((Tool("get"), Tool("now")), frozenset({"get", "now"}), form=FORM)


def deltas_of(token_ids: list[int], **fields: Any) -> tuple[str, RequestState]:
    state = RequestState(TOKENIZER, StopConditions(tools=PLAN, **fields))
    text = ""
    for index, token_id in enumerate(token_ids):
        reason = FinishReason.LENGTH if index == len(token_ids) - 1 else None
        delta = state.update(SequenceOutput(request_id="r", token_ids=[token_id], finish_reason=reason))
        text += delta.text if delta is not None else ""
    return text, state


def test_only_tokens_are_marks_and_never_what_looks_like_them() -> None:
    typed = TOKENIZER.encode_text(ONE)
    assert parse([deltas_of(typed)[0]]) == (ONE, [], False)
    real = TOKENIZER.encode_controls("a" + ONE)
    assert parse([deltas_of(real)[0]])[1] == [("get", '{"city":"Paris","days":3}')]


def test_a_stop_string_ends_text_and_is_not_looked_for_in_a_call() -> None:
    for stop in ("call", "{", "city", "Pa", "get"):
        text, state = deltas_of(TOKENIZER.encode_controls("ab" + ONE), strings=(stop,))
        assert parse([text])[2], stop
    text, state = deltas_of(TOKENIZER.encode_controls("ab user " + ONE), strings=("user",))
    assert text == "ab "
    assert state.is_finished
