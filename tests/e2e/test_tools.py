"""Calls that are whole and valid whatever the weights are, through the official SDKs of three dialects.

The tiny checkpoint's weights are random: what it writes is valid because nothing else can be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.server_process import ServerProcess, running_server
from tests.tiny_checkpoint import write_tiny_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
NAMES = ("get_weather", "now")
FUNCTIONS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
USER: Any = {"role": "user", "content": "hi"}
SEEDS = range(4)
MAX_TOKENS = 500
"""The weights like spaces, wherever some may be written."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With room for declarations, which take a token for nearly each character."""
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "roomy", context=4096)
    with running_server(checkpoint, "--dtype", "float32", "--num-threads", "1") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def assert_valid(name: str, arguments: Any) -> None:
    if name == "now":
        assert arguments == {}
        return
    assert name == "get_weather"
    assert set(arguments) == {"unit", "days"}
    assert arguments["unit"] in ("C", "F")
    assert 1 <= arguments["days"] <= 9


def options(model: str, **fields: Any) -> Any:
    return {"model": model, "messages": [USER], "max_tokens": MAX_TOKENS, "tools": FUNCTIONS, **fields}


def test_a_required_call_is_valid_and_its_stream_the_same(client: openai.OpenAI, model: str) -> None:
    for seed in SEEDS:
        asked = options(model, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (choice,) = client.chat.completions.create(**asked).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert_valid(call.function.name, json.loads(call.function.arguments))
        with client.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices
        assert streamed.finish_reason == "tool_calls"
        assert streamed.message.tool_calls is not None
        assert streamed.message.tool_calls[0].function.name == call.function.name
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


def test_a_named_call_is_of_that_tool_in_every_choice(client: openai.OpenAI, model: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        **options(model, tool_choice=named, parallel_tool_calls=False, n=3, seed=0)
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert_valid("get_weather", json.loads(call.function.arguments))


def test_several_calls_are_all_valid(client: openai.OpenAI, model: str) -> None:
    for seed in SEEDS:
        (choice,) = client.chat.completions.create(**options(model, tool_choice="required", seed=seed)).choices
        calls = choice.message.tool_calls or []
        for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
            assert_valid(call.function.name, json.loads(call.function.arguments))


def test_with_auto_random_weights_write_text(client: openai.OpenAI, model: str) -> None:
    with_tools = client.chat.completions.create(**options(model, seed=1, max_tokens=30))
    assert with_tools.choices[0].message.tool_calls is None
    assert with_tools.choices[0].message.content


def test_a_stop_string_does_not_cut_a_call(client: openai.OpenAI, model: str) -> None:
    asked = options(model, tool_choice="required", parallel_tool_calls=False, seed=3, stop=["}", '"'])
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"


def test_the_openai_sdk_makes_a_round_trip(client: openai.OpenAI, model: str) -> None:
    asked = options(model, tool_choice="required", parallel_tool_calls=False, seed=0)
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "warm"}
    messages = [USER, message, result]
    answer = client.chat.completions.create(
        **options(model, messages=messages, max_tokens=10, tool_choice="none")
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_responses_make_a_round_trip(client: openai.OpenAI, model: str) -> None:
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": SCHEMA}]
    asked: Any = {"model": model, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    answer = client.responses.create(input="hi", **asked)
    (call,) = answer.output
    assert call.type == "function_call"
    assert_valid(call.name, json.loads(call.arguments))
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "warm"}
    with client.responses.stream(input=[USER, call, result], **asked) as stream:  # type: ignore[list-item]  # plain dicts
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert_valid(streamed.name, json.loads(streamed.arguments))
    form: Any = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA, "strict": True}}
    assert_valid(
        "get_weather", json.loads(client.responses.create(model=model, input="hi", text=form).output_text)
    )


def test_the_anthropic_sdk_makes_a_round_trip(server: ServerProcess, model: str) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = {
        "model": model,
        "max_tokens": MAX_TOKENS,
        "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    with client.messages.stream(messages=[USER], **asked) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use"
    (use,) = answer.content
    assert use.type == "tool_use"
    assert_valid(use.name, use.input)
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "warm"}
    messages: Any = [
        USER,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    counted = client.messages.count_tokens(
        model=model, messages=messages, tools=asked["tools"], tool_choice=asked["tool_choice"]
    )
    again = client.messages.create(messages=messages, **asked)
    assert again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0) == counted.input_tokens
    (use,) = again.content
    assert use.type == "tool_use"
    assert_valid(use.name, use.input)
