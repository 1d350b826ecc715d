"""OpenAI's Responses API, and its official SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.chat_template import ChatMessage, render_chat
from server.tool_format import Tool, ToolCall, declarations_text
from tests.api.support import MODEL, TOKENIZER, LiveServer, assert_error, fresh, live_server, named_events

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GET = {"type": "function", "name": "get", "description": "Gets.", "parameters": PARAMETERS}
CALL = '{"name": "get", "parameters": {"city": "日本"}}'
TEXT = "ab user 日 model"


@pytest.fixture(scope="module")
def _roomy() -> Iterator[LiveServer]:
    with live_server(max_model_len=4096) as live:
        yield live


@pytest.fixture
def server(_roomy: LiveServer) -> Iterator[LiveServer]:
    yield from fresh(_roomy)


@pytest.fixture
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: LiveServer, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/responses", json={"model": MODEL, "input": "ab", **fields})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    found = named_events(response)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def ids(*messages: ChatMessage, declarations: str = "") -> list[int]:
    return render_chat(messages, TOKENIZER, declarations=declarations).token_ids(TOKENIZER)


def test_a_response_is_answered_in_openai_s_shape(server: LiveServer) -> None:
    server.script.cached_tokens = 3
    body = post(server, instructions="S", metadata={"a": "b"}, temperature=0.5, max_output_tokens=50).json()
    assert body.pop("id").startswith("resp_")
    assert isinstance(body.pop("created_at"), int)
    (item,) = body.pop("output")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}],
    }
    prompt = ids(ChatMessage("system", "S"), ChatMessage("user", "ab"))
    assert server.engine.submitted[0].prompt_token_ids == prompt
    output = len(TOKENIZER.encode_text(TEXT)) + 1
    assert body == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": "S",
        "max_output_tokens": 50,
        "metadata": {"a": "b"},
        "model": MODEL,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": len(prompt),
            "input_tokens_details": {"cached_tokens": 3},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(prompt) + output,
        },
    }


def test_a_stream_builds_the_response_up(server: LiveServer) -> None:
    found = events(post(server, stream=True))
    names = [event["type"] for event in found]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(names[4:-4]) == {"response.output_text.delta"}
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert "".join(event["delta"] for event in found[4:-4]) == TEXT
    assert found[-4]["text"] == TEXT
    item_id = found[2]["item"]["id"]
    assert {event["item_id"] for event in found[3:-2]} == {item_id}
    assert {event["output_index"] for event in found[2:-1]} == {0}
    final = found[-1]["response"]
    assert final["output"] == [found[-2]["item"]]
    assert final["usage"]["output_tokens"] == len(TOKENIZER.encode_text(TEXT)) + 1
    assert final["id"] == found[0]["response"]["id"]


@pytest.mark.parametrize("tokens_per_output", [1, 1000])
def test_calls_are_items_of_their_own(server: LiveServer, tokens_per_output: int) -> None:
    server.script.text, server.script.tokens_per_output = f"Look: {CALL}\n{CALL}", tokens_per_output
    output = post(server, tools=[GET]).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[0]["content"][0]["text"] == "Look:"
    call = output[1]
    assert call["id"].startswith("fc_")
    assert call["call_id"].startswith("call_")
    assert call["call_id"] != output[2]["call_id"]
    assert (call["name"], call["arguments"], call["status"]) == ("get", '{"city": "日本"}', "completed")

    found = events(post(server, tools=[GET], stream=True))
    for index in (1, 2):
        mine = [event for event in found if event.get("output_index") == index]
        kinds = [event["type"] for event in mine]
        assert kinds[0] == "response.output_item.added"
        assert mine[0]["item"]["arguments"] == ""
        assert kinds[-2:] == ["response.function_call_arguments.done", "response.output_item.done"]
        assert set(kinds[1:-2]) == {"response.function_call_arguments.delta"}
        assert "".join(event["delta"] for event in mine[1:-2]) == '{"city": "日本"}'
        assert mine[-2]["arguments"] == mine[-1]["item"]["arguments"] == '{"city": "日本"}'
    # No item begins before the last one has ended.
    indexes = [event["output_index"] for event in found if "output_index" in event]
    assert indexes == sorted(indexes)
    assert len(found[-1]["response"]["output"]) == 3


def test_a_response_cut_off_is_incomplete(server: LiveServer) -> None:
    for text, tools in ((TEXT, []), (CALL, [GET])):
        server.script.text = text
        body = post(server, max_output_tokens=18 if tools else 4, tools=tools).json()
        assert body["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert body["output"][-1]["status"] == "incomplete"
        found = events(post(server, max_output_tokens=18 if tools else 4, tools=tools, stream=True))
        assert found[-1]["type"] == "response.incomplete"
        assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_failure_is_told_by_the_response(server: LiveServer) -> None:
    server.script.error_after = 2
    assert_error(post(server), 500, code="generation_failed")
    failed = events(post(server, stream=True))[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    server.script.error_after, server.script.crash_after = None, 2
    response = post(server, stream=True)
    assert "event: error" in response.text
    assert "secret" not in response.text


def test_items_are_rendered_as_a_conversation(server: LiveServer) -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get", "arguments": '{"city": "a"}'},
        {"type": "function_call", "call_id": "c2", "name": "get", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "cold"}]},
        {"type": "function_call_output", "call_id": "c1", "output": "warm"},
    ]
    assert post(server, input=items, tools=[GET]).status_code == 200
    calls = (ToolCall("c1", "get", '{"city": "a"}'), ToolCall("c2", "get", "{}"))
    assert server.engine.submitted[0].prompt_token_ids == ids(
        ChatMessage("developer", "D"),
        ChatMessage("user", "weather?"),
        ChatMessage("assistant", "I look.", calls),
        ChatMessage("tool", "cold", call_id="c2"),
        ChatMessage("tool", "warm", call_id="c1"),
        declarations=declarations_text([Tool("get", "Gets.", PARAMETERS)], is_parallel=True),
    )


@pytest.mark.parametrize(
    ("choice", "shown", "is_required"),
    [
        (None, "auto", False),
        ("required", "required", True),
        ({"type": "function", "name": "get"}, {"type": "function", "name": "get"}, True),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get"}]},
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get"}]},
            False,
        ),
    ],
)
def test_tool_choice_decides_the_grammar(
    server: LiveServer, choice: Any, shown: Any, is_required: bool
) -> None:
    server.script.text = CALL
    assert post(server, tools=[GET], tool_choice=choice).json()["tool_choice"] == shown
    grammar = server.engine.submitted[0].params.grammar
    assert grammar is not None
    assert ("TEXT" not in grammar) == is_required


def test_a_form_of_the_text_reaches_the_engine(server: LiveServer) -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert post(server, text={"format": form}).json()["text"] == {"format": form}
    assert "json_schema" in str(server.engine.submitted[0].params.grammar)
    bad = {**form, "schema": {"type": "nothing"}}
    assert "text.format.schema" in assert_error(
        post(server, text={"format": bad}), 400, param="text.format.schema"
    )
    # Beside tools it is the one other thing that may be written.
    assert post(server, text={"format": form}, tools=[GET]).status_code == 200
    assert "@answer" in str(server.engine.submitted[-1].params.grammar)


def test_log_probabilities_come_where_included(server: LiveServer) -> None:
    assert post(server).json()["output"][0]["content"][0]["logprobs"] == []
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    scored = post(server, **fields).json()["output"][0]["content"][0]["logprobs"]
    assert len(scored) == len(TOKENIZER.encode_text(TEXT))
    assert len(scored[0]["top_logprobs"]) == 1
    found = events(post(server, stream=True, **fields))
    streamed = [token for event in found if event["type"].endswith("text.delta") for token in event["logprobs"]]
    assert streamed == scored


def test_what_has_no_effect_is_named(server: LiveServer) -> None:
    response = post(server, store=True, truncation="auto", include=["file_search_call.results"], user="u")
    assert sorted(response.headers["x-ignored-fields"].split(", ")) == [
        "include",
        "store",
        "truncation",
        "user",
    ]
    assert "x-ignored-fields" not in post(server, store=False, truncation="disabled").headers


def test_nothing_is_kept(server: LiveServer) -> None:
    for fields in (
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"conversation": {"id": "c"}},
    ):
        (name,) = fields
        message = assert_error(post(server, **fields), 400, param=name, code="unsupported_parameter")
        assert "not kept" in message
    message = assert_error(server.http.get("/v1/responses/resp_1"), 404, code="response_not_found")
    assert "not kept" in message


IMAGE = {"type": "input_image", "image_url": "http://x"}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "r"}
USE = {"type": "function_call", "call_id": "1", "name": "get", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [RESULT]}, "input[0].call_id"),
        ({"input": [USE, USE]}, "input[1].call_id"),
        ({"input": [{**USE, "name": None}]}, "input[0].name"),
        ({"input": [USE, {**RESULT, "output": None}]}, "input[1].output"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [GET, GET]}, "tools[1].name"),
        ({"tools": [{**GET, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [GET], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "a" * 200_000}, "input"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_requests_are_refused_by_name(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    assert_error(post(server, **fields), 400, param=param)
    assert not server.engine.submitted


def test_a_client_that_leaves_ends_the_generation(server: LiveServer) -> None:
    server.script.delay, server.script.ends_with_stop = 0.01, False
    with server.http.stream("POST", "/v1/responses", json={"input": "a", "stream": True}) as response:
        next(response.iter_bytes())
    server.assert_idle()


def test_the_sdk_makes_a_round_trip_with_a_tool(sdk: openai.OpenAI, server: LiveServer) -> None:
    options: Any = {"model": MODEL, "tools": [GET]}
    assert sdk.responses.create(model=MODEL, input="a").output_text == TEXT
    server.script.text = CALL
    items: list[Any] = [{"role": "user", "content": "weather?"}]
    answer = sdk.responses.create(input=items, **options)
    (call,) = answer.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "日本"}
    items += [*answer.output, {"type": "function_call_output", "call_id": call.call_id, "output": "warm"}]
    assert sdk.responses.create(input=items, **options).status == "completed"


def test_the_sdk_streams(sdk: openai.OpenAI, server: LiveServer) -> None:
    with sdk.responses.stream(model=MODEL, input="a") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == TEXT
    server.script.text = f"Look: {CALL}"
    tools: Any = [GET]
    with sdk.responses.stream(model=MODEL, input="a", tools=tools) as stream:
        final = stream.get_final_response()
    assert final.output_text == "Look:"
    assert final.output[1].type == "function_call"
    assert final.output[1].arguments == '{"city": "日本"}'
