"""The official SDK works as it is."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.api.support import MODEL, LiveServer, live_server


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with live_server(api_key=["sk-test"]) as live:
        yield live


@pytest.fixture
def client(keyed: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-test", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "ab"}],
        logprobs=True,
        top_logprobs=2,
        n=2,
        seed=1,
    )
    assert [choice.message.content for choice in answer.choices] == ["ab user 日 model"] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].logprob == -0.5
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "ab"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "ab user 日 model"
    assert parts[-1].usage is not None


def test_chat_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "ab"}]) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == "ab user 日 model"
    assert completion.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["ab", "us"], max_tokens=3, logprobs=1, echo=True)
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "us"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset is not None
    stream = client.completions.create(model=MODEL, prompt="ab", stream=True)
    assert "".join(part.choices[0].text for part in stream) == "ab user 日 model"


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_errors_are_the_sdk_s_classes(client: openai.OpenAI, keyed: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="ab", temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    keyed.script.error_after = 1
    try:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=MODEL, prompt="ab")
        with pytest.raises(openai.APIError, match="engine"):
            list(client.completions.create(model=MODEL, prompt="ab", stream=True))
    finally:
        keyed.script.error_after = None


def test_raw_responses_show_what_was_ignored(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="ab", user="someone")
    assert raw.headers["x-ignored-fields"] == "user"
    assert raw.headers["x-request-id"]
