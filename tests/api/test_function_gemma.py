"""Tools with a checkpoint of FunctionGemma's tokens, in all dialects, over an engine that follows a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.chat_template import ChatMessage
from server.function_gemma_template import render_function_chat
from server.tool_format import Tool, ToolCall
from tests.api.support import LiveServer, assert_error, chunks, fresh, live_server, named_events
from tests.fixtures_tokenizers import make_function_tokenizer

TOKENIZER = make_function_tokenizer()
IDS = TOKENIZER.function_ids
USER = {"role": "user", "content": "weather?"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET = {"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [GET, NOW]
GET_TOOL, NOW_TOOL = Tool("get", "Gets.", PARAMETERS), Tool("now")
CALL = '<start_function_call>call:get{city:<escape>日本 "}<escape>}<end_function_call>'
TWO = f"Look: {CALL}<start_function_call>call:now{{}}<end_function_call>"
ARGUMENTS = '{"city":"日本 \\"}"}'


@pytest.fixture(scope="module")
def _roomy() -> Iterator[LiveServer]:
    with live_server(max_model_len=4096, tokenizer=TOKENIZER) as live:
        yield live


@pytest.fixture
def server(_roomy: LiveServer) -> Iterator[LiveServer]:
    for live in fresh(_roomy):
        writes(live, CALL)
        yield live


def writes(server: LiveServer, text: str) -> None:
    """The model's answer, which ends as FunctionGemma's do."""
    server.script.token_ids = [*TOKENIZER.encode_controls(text), IDS["<start_function_response>"]]


def grammar(server: LiveServer) -> str | None:
    (request,) = server.engine.submitted
    return request.params.grammar


def prompt(server: LiveServer) -> str:
    ids = server.engine.submitted[0].prompt_token_ids
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def post(server: LiveServer, messages: list[Any], **fields: Any) -> Any:
    return server.http.post("/v1/chat/completions", json={"messages": messages, **fields})


def test_a_call_is_answered_in_openai_s_shape(server: LiveServer) -> None:
    body = server.chat(tools=TOOLS).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["stop_reason"] is None
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get", "arguments": ARGUMENTS}
    assert body["usage"]["completion_tokens"] == len(server.script.token_ids or ())


@pytest.mark.parametrize("tokens_per_output", [1, 3, 1000])
def test_streamed_calls_are_pieces_of_json(server: LiveServer, tokens_per_output: int) -> None:
    writes(server, TWO)
    server.script.tokens_per_output = tokens_per_output
    parts = chunks(server.chat(tools=TOOLS, stream=True))
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content", "") for delta in deltas) == "Look: "
    gained = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index, (name, arguments) in enumerate([("get", ARGUMENTS), ("now", "{}")]):
        first, *rest = (call for call in gained if call["index"] == index)
        assert first["function"] == {"name": name, "arguments": ""}
        assert "".join(call["function"]["arguments"] for call in rest) == arguments
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any("escape" in json.dumps(part) or "\\udc" in json.dumps(part) for part in parts)


def test_an_answer_without_a_call_is_text_and_what_looks_like_one_stays_text(server: LiveServer) -> None:
    server.script.token_ids = TOKENIZER.encode_text(CALL)
    (choice,) = server.chat(tools=TOOLS).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_call_cut_off_by_the_token_limit_says_so(server: LiveServer) -> None:
    for max_tokens in range(1, len(TOKENIZER.encode_controls(CALL))):
        (choice,) = server.chat(tools=TOOLS, max_tokens=max_tokens).json()["choices"]
        assert choice["finish_reason"] == "length"
        for call in choice["message"].get("tool_calls", ()):
            # A character that was cut through is replaced.
            assert ARGUMENTS.startswith(call["function"]["arguments"].rstrip("\ufffd"))


def test_a_stop_string_ends_text_and_never_a_call(server: LiveServer) -> None:
    writes(server, TWO)
    (choice,) = server.chat(tools=TOOLS, stop=["city", "{", "get"]).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get", "now"]
    (choice,) = server.chat(tools=TOOLS, stop=["ook"]).json()["choices"]
    assert choice["message"]["content"] == "L"
    assert choice["finish_reason"] == "stop"


def test_control_tokens_asked_for_in_the_text_do_not_hide_calls(server: LiveServer) -> None:
    fields = {"skip_special_tokens": False, "include_stop_str_in_output": True, "logprobs": True}
    (choice,) = server.chat(tools=TOOLS, **fields).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == ARGUMENTS
    names = [token["token"] for token in choice["logprobs"]["content"]]
    assert names[0] == "<start_function_call>"
    assert len(names) == len(server.script.token_ids or ())


def test_the_prompt_is_in_functiongemma_s_form(server: LiveServer) -> None:
    call = ToolCall("call_1", "get", '{"city": "Oslo"}')
    history = [
        {"role": "system", "content": "Be terse."},
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": "get", "arguments": call.arguments}}
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'},
    ]
    assert post(server, history, tools=TOOLS).status_code == 200
    expected = render_function_chat(
        [
            ChatMessage("system", "Be terse."),
            ChatMessage("user", "weather?"),
            ChatMessage("assistant", "", (call,)),
            ChatMessage("tool", '{"sky": "clear"}', call_id=call.id),
        ],
        TOKENIZER,
        tools=[GET_TOOL, NOW_TOOL],
    )
    assert server.engine.submitted[0].prompt_token_ids == expected.token_ids(TOKENIZER)
    assert prompt(server).endswith("response:get{sky:<escape>clear<escape>}<end_function_response>")
    body = {"messages": history, "tools": TOOLS}
    for path in ("/tokenize", "/v1/chat/completions/render"):
        answer = server.http.post(path, json=body).json()
        ids = answer["tokens"] if path == "/tokenize" else answer["token_ids"]
        assert ids == expected.token_ids(TOKENIZER)


def test_the_response_token_ends_every_turn(server: LiveServer) -> None:
    writes(server, "ab")
    (choice,) = server.chat().json()["choices"]
    assert choice["message"]["content"] == "ab"
    assert choice["finish_reason"] == "stop"
    assert IDS["<start_function_response>"] in server.engine.submitted[0].params.stop_token_ids


@pytest.mark.parametrize(
    ("choice", "names", "may_be_text"),
    [
        ("auto", ["get", "now"], True),
        ("required", ["get", "now"], False),
        ({"type": "function", "function": {"name": "now"}}, ["now"], False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get"}}]},
            },
            ["get"],
            True,
        ),
    ],
)
def test_every_tool_choice_becomes_a_grammar(
    server: LiveServer, choice: Any, names: list[str], may_be_text: bool
) -> None:
    server.chat(tools=TOOLS, tool_choice=choice)
    lines = (grammar(server) or "").splitlines()
    calls = [line for line in lines if line.startswith("call_")]
    assert [line.split('"call:')[1].split('"')[0] for line in calls] == names
    assert lines[0].startswith("start: TEXT?") == may_be_text
    assert "declaration:get{" in prompt(server)
    assert "declaration:now{" in prompt(server)


def test_without_a_choice_of_tools_nothing_is_declared_or_constrained(server: LiveServer) -> None:
    server.chat(tools=TOOLS, tool_choice="none")
    assert grammar(server) is None
    assert "declaration" not in prompt(server)


def test_what_cannot_be_enforced_is_named_or_refused(server: LiveServer) -> None:
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    answer = server.chat(tools=[tool])
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "tools[0].function.parameters"
    tool["function"]["strict"] = True
    message = assert_error(server.chat(tools=[tool]), 400, param="tools[0].function.parameters")
    assert "'format'" in message
    tool["function"]["parameters"] = {"type": "object", "properties": {"a": {"type": "text"}}}
    assert_error(server.chat(tools=[tool]), 400, param="tools[0].function.parameters")


def test_messages_of_anthropic_s_dialect_have_the_same_calls(server: LiveServer) -> None:
    body = {
        "model": "tiny",
        "max_tokens": 100,
        "messages": [USER],
        "tools": [{"name": "get", "description": "Gets.", "input_schema": PARAMETERS}],
    }
    answer = server.http.post("/v1/messages", json=body).json()
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"][0]["input"] == json.loads(ARGUMENTS)
    assert "declaration:get{description:<escape>Gets.<escape>" in prompt(server)
    events = named_events(server.http.post("/v1/messages", json={**body, "stream": True}))
    parts = [
        event["delta"]["partial_json"]
        for event in events
        if event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta"
    ]
    assert "".join(parts) == ARGUMENTS
    counted = server.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert counted == len(server.engine.submitted[0].prompt_token_ids)


def test_responses_have_the_same_calls(server: LiveServer) -> None:
    body = {
        "model": "tiny",
        "input": "weather?",
        "tools": [{"type": "function", "name": "get", "description": "Gets.", "parameters": PARAMETERS}],
    }
    answer = server.http.post("/v1/responses", json=body).json()
    (call,) = [item for item in answer["output"] if item["type"] == "function_call"]
    assert call["arguments"] == ARGUMENTS
    assert "declaration:get{description:<escape>Gets.<escape>" in prompt(server)
    events = named_events(server.http.post("/v1/responses", json={**body, "stream": True}))
    parts = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(parts) == ARGUMENTS
