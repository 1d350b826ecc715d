"""The official Python SDK's helpers for structured output and tools, with the embedded model.

It is a base model that understands neither: what comes is what the server holds it to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.server_process import ServerProcess
from tests.sdk.conftest import API_KEY

pytestmark = pytest.mark.slow

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": "Paint the door red, twice."}
]


class Paint(BaseModel):
    """Paint something."""

    colour: Literal["red", "green", "blue"]
    coats: Literal[1, 2, 3]
    shiny: bool


class Plan(BaseModel):
    steps: list[Paint] = Field(min_length=1, max_length=2)
    first: Paint | None


@pytest.fixture
def client(embedded: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Plan, temperature=0, max_tokens=300
    )
    assert isinstance(answer.choices[0].message.parsed, Plan)
    assert answer.choices[0].finish_reason == "stop"


def test_parse_gives_an_object_for_each_choice(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Paint, n=3, temperature=1, seed=2, max_tokens=300
    )
    assert all(isinstance(choice.message.parsed, Paint) for choice in answer.choices)


def test_a_cut_answer_is_an_error_of_the_sdk(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=model, messages=MESSAGES, response_format=Plan, max_tokens=3)


def test_a_stream_is_parsed_as_it_comes(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=MESSAGES, response_format=Paint, temperature=0, max_tokens=300
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Paint)


def test_json_mode_begins_an_object(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, response_format={"type": "json_object"}, temperature=0, max_tokens=60
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_class_is_a_tool_and_its_arguments_are_parsed(client: openai.OpenAI, model: str) -> None:
    tool = openai.pydantic_function_tool(Paint)
    answer = client.chat.completions.parse(
        model=model,
        messages=MESSAGES,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,  # a base model would call on and on
        temperature=0,
        max_tokens=300,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Paint) for call in calls)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_streamed_tool_call_is_put_together_and_parsed(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Paint)],
        tool_choice={"type": "function", "function": {"name": "Paint"}},
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=300,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Paint)
    assert [event.type for event in events].count("tool_calls.function.arguments.done") == 1


def test_a_result_goes_back_as_the_sdk_writes_it(client: openai.OpenAI, model: str) -> None:
    tool = openai.pydantic_function_tool(Paint)
    first = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,  # a base model would call on and on
        temperature=0,
        max_tokens=300,
    )
    message = first.choices[0].message
    assert message.tool_calls
    results: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "tool", "tool_call_id": call.id, "content": "It is red."} for call in message.tool_calls
    ]
    # As its documentation does it: the answer itself goes back into the list, nulls and all.
    history = [*MESSAGES, message, *results]
    second = client.chat.completions.create(
        model=model, messages=history, tools=[tool], tool_choice="none", temperature=0, max_tokens=8
    )
    assert second.choices[0].message.content
    question = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1)
    assert second.usage is not None
    assert question.usage is not None
    assert second.usage.prompt_tokens > question.usage.prompt_tokens + 10, "the call and its result are read"
