"""Tools in chat completions. The engine of these tests obeys no grammar; what it is given is looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher

from server.chat_template import ChatMessage, render_chat
from server.tool_format import Tool, ToolCall, declarations_text
from tests.api.support import TOKENIZER, LiveServer, assert_error, chunks, fresh, live_server
from tests.grammars import accepts

USER = {"role": "user", "content": "weather?"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET = {"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [GET, NOW]
CALL = '{"name": "get", "parameters": {"city": "日本"}}'
TWO = f'Look: {CALL}\n{{"name": "now", "parameters": {{}}}}'


@pytest.fixture(scope="module")
def _roomy() -> Iterator[LiveServer]:
    with live_server(max_model_len=4096) as live:
        yield live


@pytest.fixture
def server(_roomy: LiveServer) -> Iterator[LiveServer]:
    for live in fresh(_roomy):
        live.script.text = CALL
        yield live


def grammar(server: LiveServer) -> str | None:
    (request,) = server.engine.submitted
    return request.params.grammar


def prompt(server: LiveServer) -> list[int]:
    return server.engine.submitted[0].prompt_token_ids


def post(server: LiveServer, messages: list[Any], **fields: Any) -> Any:
    return server.http.post("/v1/chat/completions", json={"messages": messages, **fields})


def test_a_call_is_answered_in_openai_s_shape(server: LiveServer) -> None:
    body = server.chat(tools=TOOLS).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "get", "arguments": '{"city": "日本"}'},
    }


def test_text_before_calls_is_the_content(server: LiveServer) -> None:
    server.script.text = TWO
    message = server.chat(tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] == "Look:"
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get", "now"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_an_answer_without_a_call_is_text(server: LiveServer) -> None:
    server.script.text = 'no {"name": "bob"}'
    (choice,) = server.chat(tools=TOOLS).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": 'no {"name": "bob"}', "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])
def test_a_streamed_call_begins_with_its_name_and_adds_up(server: LiveServer, tokens_per_output: int) -> None:
    server.script.text, server.script.tokens_per_output = TWO, tokens_per_output
    parts = chunks(server.chat(tools=TOOLS, stream=True))
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content", "") for delta in deltas) == "Look:"
    gained = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(len(calls) == 1 for calls in gained)
    for index, (name, arguments) in enumerate([("get", '{"city": "日本"}'), ("now", "{}")]):
        first, *rest = (calls[0] for calls in gained if calls[0]["index"] == index)
        assert first["id"].startswith("call_")
        assert first["type"] == "function"
        assert first["function"] == {"name": name, "arguments": ""}
        assert all(
            set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest
        )
        assert "".join(call["function"]["arguments"] for call in rest) == arguments
        assert len(rest) > 1 or tokens_per_output > 1 or name == "now"
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_every_choice_has_its_own_calls(server: LiveServer) -> None:
    choices = server.chat(tools=TOOLS, n=3).json()["choices"]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 3
    parts = chunks(server.chat(tools=TOOLS, n=2, stream=True))
    for index in range(2):
        arguments = "".join(
            call["function"]["arguments"]
            for part in parts
            if part["choices"][0]["index"] == index
            for call in part["choices"][0]["delta"].get("tool_calls", ())
        )
        assert arguments == '{"city": "日本"}'


def test_the_tokens_of_a_call_have_their_log_probabilities(server: LiveServer) -> None:
    num_tokens = len(TOKENIZER.encode_text(CALL))
    whole = server.chat(tools=TOOLS, logprobs=True).json()["choices"][0]
    assert len(whole["logprobs"]["content"]) == num_tokens
    parts = chunks(server.chat(tools=TOOLS, logprobs=True, stream=True))
    scored = [token for part in parts for token in (part["choices"][0]["logprobs"] or {}).get("content", ())]
    assert len(scored) == num_tokens


def test_a_call_cut_off_by_the_token_limit_says_so(server: LiveServer) -> None:
    for max_tokens in (15, 30):
        (choice,) = server.chat(tools=TOOLS, max_tokens=max_tokens).json()["choices"]
        assert choice["finish_reason"] == "length"
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        assert '{"city": "日本"}'.startswith(arguments)
        parts = chunks(server.chat(tools=TOOLS, max_tokens=max_tokens, stream=True))
        assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_text_and_never_a_call(server: LiveServer) -> None:
    server.script.text = TWO
    for stream in (False, True):
        response = server.chat(tools=TOOLS, stop=["city", "}"], stream=stream)
        reasons = (
            [part["choices"][0]["finish_reason"] for part in chunks(response)]
            if stream
            else [choice["finish_reason"] for choice in response.json()["choices"]]
        )
        assert reasons[-1] == "tool_calls"
        (choice,) = server.chat(tools=TOOLS, stop=["ok"]).json()["choices"]
        assert choice["message"]["content"] == "Lo"
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == "ok"
    (choice,) = server.chat(tools=TOOLS, tool_choice="required", stop=["name"]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"


def test_the_model_is_told_of_the_tools_as_text(server: LiveServer) -> None:
    assert server.chat(tools=TOOLS).status_code == 200
    tools = [Tool("get", "Gets.", PARAMETERS), Tool("now")]
    declarations = declarations_text(tools, is_parallel=True)
    expected = render_chat([ChatMessage("user", "ab")], TOKENIZER, declarations=declarations)
    assert prompt(server) == expected.token_ids(TOKENIZER)
    tokenized = server.http.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "ab"}], "tools": TOOLS}
    )
    assert tokenized.json()["tokens"] == prompt(server)


def test_an_agent_s_conversation_is_rendered(server: LiveServer) -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city": "a"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "warm"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
    ]
    assert post(server, messages).status_code == 200
    expected = render_chat(
        [
            ChatMessage("user", "weather?"),
            ChatMessage("assistant", "", (ToolCall("x", "get", '{"city": "a"}'),)),
            ChatMessage("tool", "warm", call_id="x"),
            ChatMessage("assistant", "", (ToolCall("x", "now", ""),)),
            ChatMessage("tool", "12", call_id="x"),
        ],
        TOKENIZER,
    )
    assert prompt(server) == expected.token_ids(TOKENIZER)


@pytest.mark.parametrize(
    ("fields", "accepted", "refused"),
    [
        ({}, ["hi", CALL, f"{CALL}\n{CALL}"], ['{"name": "get", "parameters": {}}']),
        ({"tool_choice": "auto"}, ["hi", CALL], []),
        ({"tool_choice": "required"}, [CALL, f"{CALL}\n{CALL}"], ["hi"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], ["hi", f"{CALL}\n{CALL}"]),
        ({"parallel_tool_calls": False}, ["hi", CALL], [f"{CALL}\n{CALL}"]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "now"}}},
            ['{"name": "now", "parameters": {}}'],
            [CALL, "hi"],
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "get"}}],
                    },
                }
            },
            [CALL],
            ["hi", '{"name": "now", "parameters": {}}'],
        ),
    ],
)
def test_the_engine_is_given_a_grammar_of_the_choice(
    server: LiveServer, fields: dict[str, Any], accepted: list[str], refused: list[str]
) -> None:
    assert server.chat(tools=TOOLS, **fields).status_code == 200
    text = grammar(server)
    assert text is not None
    assert not LLMatcher.validate_grammar(text)
    assert all(accepts(text, value) for value in accepted)
    assert not any(accepts(text, value) for value in refused)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tools": []}, {"tools": None}, {"tools": TOOLS, "tool_choice": "none"}, {"tool_choice": "none"}],
)
def test_without_tools_to_call_nothing_changes(server: LiveServer, fields: dict[str, Any]) -> None:
    server.script.text = CALL
    (choice,) = server.chat(**fields).json()["choices"]
    assert choice["message"]["content"] == CALL
    assert "tool_calls" not in choice["message"]
    assert grammar(server) is None
    assert prompt(server) == render_chat([ChatMessage("user", "ab")], TOKENIZER).token_ids(TOKENIZER)


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.covers("R29")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{**NOW, "type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [NOW] * 2}, "tools[1].function.name"),
        ({"tools": [function(name=f"f{i}")["tools"][0] for i in range(129)]}, "tools"),
        (function(name=""), "tools[0].function.name"),
        (function(name="a b"), "tools[0].function.name"),
        (function(name="a\n"), "tools[0].function.name"),
        (function(name="a" * 129), "tools[0].function.name"),
        (function(name='a"b'), "tools[0].function.name"),
        (function(parameters=[]), "tools[0].function.parameters"),
        (function(parameters={"type": "array"}), "tools[0].function.parameters"),
        (function(parameters={"properties": {"a": {"type": "nothing"}}}), "tools[0].function.parameters"),
        (function(parameters={"properties": {"a": {"not": {}}}}, strict=True), "tools[0].function.parameters"),
        (function(parameters={"description": "a" * 300_000}), "tools"),
        (function(parameters={"properties": {"a": {"$ref": "#/$defs/b"}}}), "tools[0].function.parameters"),
        (function(parameters={"properties": {"a": {"pattern": "("}}}), "tools[0].function.parameters"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 3}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_tools_are_refused_by_name(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    assert_error(server.chat(**fields), 400, param=param)
    assert not server.engine.submitted


def test_the_old_fields_are_refused_with_a_hint(server: LiveServer) -> None:
    assert "use 'tools'" in assert_error(server.chat(functions=[{"name": "f"}]), 400)
    assert "use 'tool_choice'" in assert_error(server.chat(function_call={"name": "f"}), 400)
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert "'tool_calls'" in assert_error(post(server, [USER, message]), 400)


def calls(*ids: str, **fields: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": "get", "arguments": "{}"}} for id in ids
        ],
        **fields,
    }


RESULT = {"role": "tool", "tool_call_id": "1", "content": "r"}


@pytest.mark.covers("R13")
@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, RESULT], "messages[1].tool_call_id"),
        ([USER, calls("2"), RESULT], "messages[2].tool_call_id"),
        ([USER, RESULT, calls("1")], "messages[1].tool_call_id"),
        ([USER, calls("1"), {"role": "tool", "content": "r"}], "messages[2].tool_call_id"),
        ([USER, calls("1"), {"role": "tool", "tool_call_id": "1"}], "messages[2].content"),
        ([USER, calls("1", "1"), RESULT], "messages[1].tool_calls[1].id"),
        ([USER, calls("")], "messages[1].tool_calls[0].id"),
        ([{**USER, "tool_calls": calls("1")["tool_calls"]}], "messages[0].tool_calls"),
        ([{**USER, "tool_call_id": "1"}], "messages[0].tool_call_id"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "messages[1].content"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls[0].function"),
        ([USER, {"role": "function", "name": "f", "content": "r"}], "messages[1].role"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_messages_that_belong_to_no_call_are_refused(
    server: LiveServer, messages: list[Any], param: str
) -> None:
    assert_error(post(server, messages, tools=TOOLS), 400, param=param)


@pytest.mark.parametrize(
    "messages",
    [
        [USER, calls("1"), USER],
        [USER, calls("1", "2"), RESULT],
        [USER, calls("1"), RESULT, RESULT],
        [USER, calls("1"), USER, RESULT],
        [calls("1", content=""), RESULT],
        [USER, {"role": "assistant", "content": "a", "tool_calls": []}, USER],
    ],
)
def test_histories_that_frameworks_cut_or_reorder_are_answered(server: LiveServer, messages: list[Any]) -> None:
    assert post(server, messages, tools=TOOLS).status_code == 200


def test_parameters_that_cannot_be_enforced_entirely_are_named(server: LiveServer) -> None:
    tools = [GET, function(parameters={"type": "object", "properties": {"a": {"not": {}}}})["tools"][0]]
    assert server.chat(tools=TOOLS).headers.get("x-ignored-fields") is None
    assert server.chat(tools=tools).headers["x-ignored-fields"] == "tools[1].function.parameters"
    both = server.chat(tools=tools, user="u").headers["x-ignored-fields"]
    assert both == "user, tools[1].function.parameters"


def test_arguments_are_valid_json_whatever_is_in_them(server: LiveServer) -> None:
    arguments = json.dumps({"city": 'a"}]{[\\ \n日', "x": [{}, [], {"y": "}"}]}, ensure_ascii=False)
    server.script.text = f'{{"name": "get", "parameters": {arguments}}}'
    call = server.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["arguments"] == arguments


@pytest.mark.covers("R29", "S23")
def test_tools_that_are_too_large_together_are_refused_before_any_is_compiled(server: LiveServer) -> None:
    properties = {f"property{number}": {"type": "string"} for number in range(500)}
    tools = [function(name=f"f{i}", parameters={"properties": properties})["tools"][0] for i in range(20)]
    started = time.monotonic()
    assert "at most 262144" in assert_error(server.chat(tools=tools), 400, param="tools")
    assert time.monotonic() - started < 2
