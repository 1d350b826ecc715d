"""The official Python SDK: retries, timeouts, raw answers, and what ends a stream early."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import openai
import pytest

from tests.api.support import MODEL, LiveServer, Script, wait_until
from tests.sdk.conftest import API_KEY

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "ab"}]
ANSWER = "ab user 日 model"


@pytest.fixture
def client(scripted: LiveServer) -> Iterator[openai.OpenAI]:
    scripted.engine.script = Script()
    scripted.engine.aborted.clear()
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client
    scripted.assert_idle()


@pytest.fixture
async def async_client(scripted: LiveServer) -> openai.AsyncOpenAI:
    scripted.engine.script = Script()
    return openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key=API_KEY, max_retries=0)


def test_a_chat_with_every_common_parameter(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "us", "name": "ada"},
        ],
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["zz"],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"9": 5},
        max_completion_tokens=20,
        user="somebody",
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"


async def test_async_chats_at_once(async_client: openai.AsyncOpenAI) -> None:
    async with async_client as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        answer = await client.completions.create(model=MODEL, prompt="ab")
    assert "".join(pieces) == answer.choices[0].text == ANSWER


def test_raw_answers_have_headers_and_parse(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.request_id
    assert raw.parse().choices[0].message.content == ANSWER


def test_raw_streams_are_lines_of_events(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=MESSAGES, stream=True
    ) as raw:
        lines = [line for line in raw.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_the_stream_helper_tells_of_content_and_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert events.count("content.done") == 1
    assert "content.delta" in events
    assert final.choices[0].message.content == ANSWER
    assert final.usage is not None
    assert final.usage.total_tokens == final.usage.prompt_tokens + final.usage.completion_tokens


def test_leaving_a_stream_early_frees_its_sequence(client: openai.OpenAI, scripted: LiveServer) -> None:
    scripted.script.ends_with_stop = False
    scripted.script.delay = 0.01
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: len(scripted.engine.aborted) == 1)


def test_a_time_limit_is_raised_as_one_and_frees_the_sequence(
    client: openai.OpenAI, scripted: LiveServer
) -> None:
    scripted.script.delay = 2.0
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model=MODEL, messages=MESSAGES)
    wait_until(lambda: len(scripted.engine.aborted) == 1)


def test_a_full_queue_is_a_rate_limit_that_a_retry_gets_past(
    client: openai.OpenAI, scripted: LiveServer
) -> None:
    """The server says when to come again, and the SDK does."""
    scripted.script.delay = 0.05
    both = threading.Thread(
        target=lambda: client.completions.create(model=MODEL, prompt="ab", n=2, max_tokens=10)
    )
    both.start()
    wait_until(lambda: len(scripted.engine.running) == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt="ab")
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "1"
    answer = client.with_options(max_retries=2).completions.create(model=MODEL, prompt="ab")
    assert answer.choices[0].text == ANSWER
    both.join()


def test_mistakes_are_not_retried(client: openai.OpenAI, scripted: LiveServer) -> None:
    before = _answered(scripted, 400)
    with pytest.raises(openai.BadRequestError):
        client.with_options(max_retries=3).completions.create(model=MODEL, prompt="ab", temperature=3)
    assert _answered(scripted, 400) == before + 1


def _answered(server: LiveServer, status: int) -> int:
    lines = server.http.get("/metrics").text.splitlines()
    counters = [line for line in lines if f'"{status}"' in line and "_total{" in line and "http" in line]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in counters)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 30, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "ab " * 5000}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "wizard", "content": "ab"}]}, "messages[0].role", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_bad_requests_that_say_what(
    client: openai.OpenAI, fields: dict[str, object], param: str, code: str, stream: bool
) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": stream, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=object, body=body)
    assert caught.value.type == "invalid_request_error"
    assert (caught.value.param, caught.value.code) == (param, code)


def test_each_status_is_its_class(client: openai.OpenAI, scripted: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model=MODEL, messages=MESSAGES)
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat")
    scripted.script.error_after = 0
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_an_error_within_a_stream_is_raised(client: openai.OpenAI, scripted: LiveServer) -> None:
    scripted.script.error_after = 2
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)


def test_models_are_listed_by_page_and_by_name(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.object for model in listed] == ["model", "model"]
    assert client.models.retrieve(listed[1].id) == listed[1]


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with (
        openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()
