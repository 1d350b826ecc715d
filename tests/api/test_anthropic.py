"""Anthropic's Messages API, and its official SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from server.chat_template import ChatMessage, render_chat
from server.tool_format import Tool, ToolCall, declarations_text
from tests.api.support import MODEL, TOKENIZER, LiveServer, fresh, live_server, named_events

USER = {"role": "user", "content": "weather?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET = {"name": "get", "description": "Gets.", "input_schema": SCHEMA}
CALL = '{"name": "get", "parameters": {"city": "日本"}}'
KEY = "sk-test"


@pytest.fixture(scope="module")
def _roomy() -> Iterator[LiveServer]:
    with live_server(max_model_len=4096, api_key=[KEY]) as live:
        live.http.headers["x-api-key"] = KEY
        yield live


@pytest.fixture
def server(_roomy: LiveServer) -> Iterator[LiveServer]:
    yield from fresh(_roomy)


@pytest.fixture
def sdk(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def post(server: LiveServer, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 100, "messages": [USER], **fields}
    return server.http.post("/v1/messages", json=body)


def assert_error(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind
    message: str = body["error"]["message"]
    return message


def test_a_message_is_answered_in_anthropic_s_shape(server: LiveServer) -> None:
    server.script.cached_tokens = 3
    body = post(server).json()
    assert body.pop("id").startswith("msg_")
    prompt = render_chat([ChatMessage("user", "weather?")], TOKENIZER).token_ids(TOKENIZER)
    assert server.engine.submitted[0].prompt_token_ids == prompt
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "ab user 日 model"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(prompt) - 3,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(TOKENIZER.encode_text("ab user 日 model")) + 1,
        },
    }


def test_parameters_reach_the_engine(server: LiveServer) -> None:
    response = post(server, temperature=0.25, top_p=0.5, top_k=7, max_tokens=9, stop_sequences=["zz"])
    assert response.status_code == 200
    params = server.engine.submitted[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.25, 0.5, 7, 9)


def test_the_end_is_told_as_anthropic_does(server: LiveServer) -> None:
    stopped = post(server, stop_sequences=["日", "zz"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "日")
    assert stopped["content"] == [{"type": "text", "text": "ab user "}]
    server.script.ends_with_stop = False
    assert post(server, max_tokens=5).json()["stop_reason"] == "max_tokens"
    full = post(server, max_tokens=100_000).json()
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert full["usage"]["output_tokens"] > 3000


def test_a_stream_has_anthropic_s_events_in_order(server: LiveServer) -> None:
    found = named_events(post(server, stream=True))
    names = [event["type"] for event in found]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"], start["stop_sequence"]) == ([], None, None)
    assert start["usage"]["input_tokens"] > 0
    assert found[2] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert "".join(event["delta"]["text"] for event in found[3:-3]) == "ab user 日 model"
    whole = post(server).json()
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize("tokens_per_output", [1, 1000])
def test_a_streamed_tool_use_is_a_block_of_its_own(server: LiveServer, tokens_per_output: int) -> None:
    server.script.text, server.script.tokens_per_output = f"Look: {CALL}\n{CALL}", tokens_per_output
    found = named_events(post(server, tools=[GET], stream=True))
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [start["index"] for start in starts] == [0, 1, 2]
    assert [start["content_block"]["type"] for start in starts] == ["text", "tool_use", "tool_use"]
    block = starts[1]["content_block"]
    assert block == {"type": "tool_use", "id": block["id"], "name": "get", "input": {}}
    assert block["id"].startswith("toolu_")
    assert block["id"] != starts[2]["content_block"]["id"]
    for index in (1, 2):
        deltas = [
            event["delta"]
            for event in found
            if event["type"] == "content_block_delta" and event["index"] == index
        ]
        assert {delta["type"] for delta in deltas} == {"input_json_delta"}
        assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"city": "日本"}
    # One block is closed before the next is opened.
    ends = ("content_block_start", "content_block_stop")
    order = [(event["type"], event["index"]) for event in found if event["type"] in ends]
    assert order == [(end, index) for index in range(3) for end in ends]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


def test_an_error_while_streaming_is_an_event(server: LiveServer) -> None:
    server.script.error_after = 2
    found = named_events(post(server, stream=True))
    assert found[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "The engine could not complete this request."},
    }
    server.script.error_after, server.script.crash_after = None, 2
    last = named_events(post(server, stream=True))[-1]
    assert last["error"]["type"] == "api_error"
    assert "secret" not in last["error"]["message"]


def test_tools_and_their_results_are_rendered(server: LiveServer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "get", "input": {"city": "日"}},
                {"type": "tool_use", "id": "toolu_2", "name": "get", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no city", "is_error": True},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "warm"}],
                },
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "T"},
    ]
    response = post(server, messages=messages, tools=[GET], system=system)
    assert response.headers["x-ignored-fields"] == "system[].cache_control"
    expected = render_chat(
        [
            ChatMessage("system", "S"),
            ChatMessage("system", "T"),
            ChatMessage("user", "a"),
            ChatMessage("user", "b"),
            ChatMessage(
                "assistant", "I look.", (ToolCall("1", "get", '{"city": "日"}'), ToolCall("2", "get", "{}"))
            ),
            ChatMessage("tool", "Error: no city", call_id="2"),
            ChatMessage("tool", "warm", call_id="1"),
            ChatMessage("user", "so?"),
        ],
        TOKENIZER,
        declarations=declarations_text([Tool("get", "Gets.", SCHEMA)], is_parallel=True),
    ).token_ids(TOKENIZER)
    assert server.engine.submitted[0].prompt_token_ids == expected
    count = server.http.post(
        "/v1/messages/count_tokens", json={"messages": messages, "tools": [GET], "system": system}
    )
    assert count.json() == {"input_tokens": len(expected)}


@pytest.mark.parametrize(
    ("choice", "is_required", "has_grammar"),
    [
        (None, False, True),
        ({"type": "auto"}, False, True),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "get"}, True, True),
        ({"type": "none"}, False, False),
    ],
)
def test_tool_choice_decides_the_grammar(
    server: LiveServer, choice: Any, is_required: bool, has_grammar: bool
) -> None:
    server.script.text = CALL
    assert post(server, tools=[GET], tool_choice=choice).status_code == 200
    if choice is not None:
        assert (
            post(server, tools=[GET], tool_choice={**choice, "disable_parallel_tool_use": True}).status_code
            == 200
        )
    grammars = [request.params.grammar for request in server.engine.submitted]
    for grammar in grammars:
        assert (grammar is not None) == has_grammar
        if grammar is not None:
            assert ("TEXT" not in grammar) == is_required
    if len(grammars) == 2 and grammars[0] is not None:
        assert ("GAP" in grammars[0]) == (choice["type"] != "tool")  # which is used once
        assert "GAP" not in str(grammars[1])


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
USE = {"type": "tool_use", "id": "1", "name": "get", "input": {}}


def after(blocks: list[Any], *results: Any) -> dict[str, Any]:
    answered = {"role": "user", "content": [*results, {"type": "text", "text": "a"}]}
    return {"messages": [{"role": "assistant", "content": blocks}, answered]}


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0]"),
        (after([RESULT]), "messages[0].content[0]"),
        (after([USE, USE]), "messages[0].content[1].id"),
        (after([{**USE, "input": None}]), "messages[0].content[0].input"),
        (after([USE], {**RESULT, "content": [IMAGE]}), "messages[1].content[0].content[0].type"),
        ({"messages": [USER, {"role": "assistant", "content": "pre"}]}, "messages"),
        ({"system": 3}, "system"),
        ({"tools": [{"name": "get"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": [GET, GET]}, "tools[1].name"),
        ({"tools": [{**GET, "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [GET], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [GET], "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice"),
        ({"tools": [GET], "tool_choice": "auto"}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
    ],
    ids=lambda value: str(value)[-60:],
)  # fmt: skip
def test_bad_requests_are_refused_in_anthropic_s_shape(
    server: LiveServer, fields: dict[str, Any], where: str
) -> None:
    assert where in assert_error(post(server, **fields), 400, "invalid_request_error")
    assert not server.engine.submitted


def test_every_other_error_has_anthropic_s_shape(server: LiveServer) -> None:
    assert_error(post(server, model="nope"), 404, "not_found_error")
    assert_error(server.http.get("/v1/messages"), 405, "invalid_request_error")
    assert_error(server.http.post("/v1/messages/nothing"), 404, "not_found_error")
    assert_error(server.http.post("/v1/messages", content=b"{"), 400, "invalid_request_error")
    large = {"messages": [USER], "max_tokens": 1, "system": "a" * 200_000}
    assert "context" in assert_error(server.http.post("/v1/messages", json=large), 400, "invalid_request_error")
    for headers in ({"x-api-key": "wrong"}, {"x-api-key": ""}, {"authorization": "Bearer wrong"}):
        with httpx.Client(base_url=server.url, headers=headers) as stranger:
            assert_error(stranger.post("/v1/messages", json={}), 401, "authentication_error")
            assert_error(stranger.post("/v1/messages/count_tokens", json={}), 401, "authentication_error")
            assert "param" in stranger.get("/v1/models").json()["error"]
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}) as friend:
        body = {"messages": [USER], "max_tokens": 1}
        assert friend.post("/v1/messages", json=body).status_code == 200
    server.script.error_after = 0
    assert_error(post(server), 500, "api_error")
    with live_server(loaded=False) as loading:
        assert_error(post(loading), 503, "overloaded_error")
    with live_server(max_queued_requests=1) as full:
        full.script.text, full.script.delay = "x" * 30, 0.1
        body = {"messages": [USER], "max_tokens": 40, "stream": True}
        with full.http.stream("POST", "/v1/messages", json=body) as response:
            pieces = response.iter_bytes()  # kept: what iterates no longer closes the connection
            next(pieces)
            assert_error(post(full, max_tokens=1), 429, "rate_limit_error")


def test_fields_without_effect_are_named(server: LiveServer) -> None:
    response = post(server, metadata={"user_id": "u"}, thinking={"type": "enabled", "budget_tokens": 1024})
    assert response.headers["x-ignored-fields"] == "metadata, thinking"


def test_a_client_that_leaves_ends_the_generation(server: LiveServer) -> None:
    server.script.delay, server.script.ends_with_stop = 0.01, False
    body = {"messages": [USER], "max_tokens": 4000, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as response:
        next(response.iter_bytes())
    server.assert_idle()


def test_the_sdk_sends_and_streams(sdk: anthropic.Anthropic) -> None:
    options: Any = {"model": MODEL, "max_tokens": 50, "messages": [USER], "system": "be brief"}
    answer = sdk.messages.create(**options)
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "ab user 日 model"
    with sdk.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == "ab user 日 model"
        assert stream.get_final_message().stop_reason == "end_turn"
    assert sdk.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "a"}]).input_tokens > 0


def test_the_sdk_makes_a_round_trip_with_a_tool(sdk: anthropic.Anthropic, server: LiveServer) -> None:
    server.script.text = f"Look: {CALL}"
    options: Any = {"model": MODEL, "max_tokens": 100, "tools": [GET]}
    whole = sdk.messages.create(messages=[USER], **options)
    with sdk.messages.stream(messages=[USER], **options) as stream:
        streamed = stream.get_final_message()
    for answer in (whole, streamed):
        assert answer.stop_reason == "tool_use"
        use = answer.content[1]
        assert use.type == "tool_use"
        assert use.input == {"city": "日本"}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "warm"}
        messages: Any = [
            USER,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},
        ]
        assert sdk.messages.create(messages=messages, **options).stop_reason == "tool_use"


def test_the_sdk_raises_its_own_errors(sdk: anthropic.Anthropic, server: LiveServer) -> None:
    options: Any = {"model": MODEL, "max_tokens": 50, "messages": [USER]}
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        sdk.messages.create(**{**options, "max_tokens": 0})
    with pytest.raises(anthropic.AuthenticationError):
        sdk.with_options(api_key="wrong").messages.create(**options)
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(**{**options, "model": "nope"})
    server.script.error_after = 2
    with pytest.raises(anthropic.APIError, match="engine"):
        list(sdk.messages.create(stream=True, **options))
