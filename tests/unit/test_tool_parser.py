from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.frontend.tool_parser import (
    LONGEST_HELD,
    ArgumentPiece,
    CallBegun,
    CallFinder,
    CallParser,
    Piece,
    TextPiece,
)

NAMES = ("get", "get_weather", "a-b")

CALL = '{"name": "get", "parameters": {"a": 1}}'
PRETTY = '{\n  "name": "get_weather",\n  "parameters": {\n    "city": "}{\\"\\\\"\n  }\n}'


def parse(parts: Sequence[str], names: Sequence[str] = NAMES) -> tuple[str, list[tuple[str, str]], bool]:
    """The text, the calls' names and arguments, and whether all are whole."""
    parser = CallParser(names)
    pieces: list[Piece] = [piece for part in parts for piece in parser.push(part)] + parser.finish()
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
    return text, calls, parser.has_whole_calls


@pytest.mark.covers("R30")
@pytest.mark.parametrize(
    ("text", "expected_text", "expected_calls"),
    [
        ("hello", "hello", []),
        ("", "", []),
        (CALL, "", [("get", '{"a": 1}')]),
        ("I look.\n\n" + CALL, "I look.", [("get", '{"a": 1}')]),
        ("```json\n" + PRETTY + "\n```", "", [("get_weather", '{\n    "city": "}{\\"\\\\"\n  }')]),
        (CALL + "\n" + PRETTY, "", [("get", '{"a": 1}'), ("get_weather", '{\n    "city": "}{\\"\\\\"\n  }')]),
        (f"See: [{CALL}, {CALL}]", "See:", [("get", '{"a": 1}')] * 2),
        (f"```tool_code\n{CALL}\n```\n```json\n{CALL}\n```", "", [("get", '{"a": 1}')] * 2),
        ('{"name": "Bob", "parameters": {}} ', '{"name": "Bob", "parameters": {}} ', []),
        ('{"name": "get_weath', '{"name": "get_weath', []),
        ('{{"name": "a-b", "parameters": {}}', "{", [("a-b", "{}")]),
        ("```python\nx = {}\n```\n", "```python\nx = {}\n```\n", []),
        ('{"name" : "get" , "parameters" : {"x": [{}, "]"]} }', "", [("get", '{"x": [{}, "]"]}')]),
    ],
)
def test_calls_and_text_are_told_apart(
    text: str, expected_text: str, expected_calls: list[tuple[str, str]]
) -> None:
    assert parse([text]) == (expected_text, expected_calls, bool(expected_calls))


FRAGMENTS = [
    "{",
    "}",
    '"',
    "\\",
    '"name"',
    ":",
    " ",
    "\n",
    "```",
    "json",
    "[",
    "get",
    "get_weather",
    ",",
    "é",
    "x",
]
TEXTS = st.lists(st.sampled_from([*FRAGMENTS, CALL, PRETTY, '{"name": "get"']), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.data())
def test_how_the_text_is_cut_does_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(parts) == parse([text])
    assert parse(list(text)) == parse([text])


def test_a_call_cut_off_is_not_whole_and_keeps_what_there_was() -> None:
    for length in range(len('{"name": "get"'), len(CALL)):
        text, calls, is_whole = parse([CALL[:length]])
        assert text == ""
        assert [name for name, _ in calls] == ["get"]
        assert '{"a": 1}'.startswith(calls[0][1])
        assert is_whole == (length == len(CALL) - 1)  # its last bracket tells nothing


@given(TEXTS)
def test_text_is_held_back_only_while_it_may_begin_a_call(text: str) -> None:
    finder = CallFinder(NAMES)
    for character in text:
        _, name, _ = finder.push(character)
        if name is not None:
            return
        assert len(finder.held) <= LONGEST_HELD
        if finder.held.strip():
            assert finder.held.lstrip()[0] in "`[{"


@pytest.mark.covers("R30")
@pytest.mark.parametrize(
    "text",
    [
        "{" * 200_000,
        " " * 200_000,
        "`" * 200_000,
        '{"name": "' * 20_000,
        "[ " * 100_000,
        "```a " * 40_000,
        "\n{" * 90_000,
    ],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    start = time.process_time()
    parse([text])
    parse([text[i : i + 7] for i in range(0, len(text), 7)])
    parse([CALL[:-2], text])
    assert time.process_time() - start < 10


def test_arguments_are_json() -> None:
    _, calls, _ = parse(list("x " + PRETTY))
    assert json.loads(calls[0][1]) == {"city": '}{"\\'}
