"""The whole server, with a tiny model: what clients get, whatever else it is doing meanwhile."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server_process import ServerProcess, running_server
from tests.tiny_checkpoint import CONTEXT

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def make_prompt(seed: int, length: int = 40) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(LETTERS) for _ in range(length))


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(client: httpx.Client, **body: Any) -> str:
    text: str = complete(client, **body)["choices"][0]["text"]
    return text


def test_the_openai_sdk_chats_and_streams(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    options: Any = {"model": client.models.list().data[0].id, "messages": messages, "max_tokens": 20, "seed": 7}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert len(streamed) > 0
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    # <bos>, two turns' openings and one end, and the folded text: system, two newlines, user.
    rendered = "<start_of_turn>user\nbe brief\n\nhello<end_of_turn>\n<start_of_turn>model\n"
    with server.client() as raw:
        count = raw.post("/tokenize", json={"prompt": rendered}).json()["count"]
    assert whole.usage.prompt_tokens == count


def test_a_top_p_of_0_is_greedy(server: ServerProcess) -> None:
    with server.client() as client:
        for seed in range(5):
            greedy = text_of(client, prompt=make_prompt(seed), max_tokens=10)
            text = text_of(client, prompt=make_prompt(seed), max_tokens=10, temperature=2, top_p=0, seed=seed)
            assert text == greedy


def test_streamed_text_is_the_whole_text_for_every_kind_of_sampling(server: ServerProcess) -> None:
    with server.client() as client:
        for seed, extra in enumerate(
            (
                {"temperature": 0},
                {"top_p": 0.8},
                {"top_k": 5},
                {"min_p": 0.1},
                {"temperature": 2.0},
                {"stop": ["e"]},
            )
        ):
            body = {"prompt": make_prompt(seed), "max_tokens": 60, "seed": seed, **extra}
            whole = text_of(client, **body)
            with client.stream(
                "POST", "/v1/completions", json={"temperature": 0, **body, "stream": True}
            ) as response:
                events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
            assert events.pop() == "[DONE]"
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole


@pytest.mark.covers("K07", "R26")
def test_a_seeded_request_says_the_same_alone_and_in_company(server: ServerProcess) -> None:
    bodies = [
        {
            "prompt": make_prompt(seed, 10 + 7 * seed),
            "max_tokens": 48,
            "temperature": 1.0,
            "seed": seed,
            "top_p": 0.9,
        }
        for seed in range(12)
    ]
    with server.client() as client:
        alone = [text_of(client, **body) for body in bodies]
        with ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(lambda body: text_of(client, **body), bodies))
        other_seed = text_of(client, **{**bodies[0], "seed": 99})
    assert together == alone
    assert other_seed != alone[0]


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9},
    {"n": 2, "temperature": 1.0},
    {"logprobs": 3},
    {"min_tokens": 50, "ignore_eos": False},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"guided_regex": "[a-f]{50}[g-z]*", "ignore_eos": False},
    {"stream": True},
]


def choices_of(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a request is told, with a stream put together."""
    if not body.get("stream"):
        choices: list[dict[str, Any]] = complete(client, **body)["choices"]
        return choices
    with client.stream("POST", "/v1/completions", json={"temperature": 0, **body}) as response:
        *events, done = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert done == "[DONE]"
    parts = [json.loads(event)["choices"][0] for event in events]
    return [parts[-1] | {"text": "".join(part["text"] for part in parts)}]


@pytest.mark.covers("K01", "K02", "R19")
def test_requests_that_outgrow_the_cache_are_preempted_and_say_what_they_say_alone(
    server: ServerProcess, tiny_checkpoint: Path
) -> None:
    bodies = [
        {"prompt": make_prompt(seed), "max_tokens": 60, "ignore_eos": True, "seed": seed}
        | KINDS[seed % len(KINDS)]
        for seed in range(32)
    ]
    with server.client() as client:
        for body in bodies[:: len(KINDS)]:
            # Late in the text, behind where others take the memory away; the longest ends inside it.
            body["stop"] = [text_of(client, **body)[30:33]]
        alone = [choices_of(client, body) for body in bodies]
    # A prompt of 40 tokens and 60 more take 7 blocks: the pool holds three such sequences.
    options = ("--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "21")
    with running_server(tiny_checkpoint, *options) as small, small.client() as client:
        with ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(lambda body: choices_of(client, body), bodies))
            # Less than the context, more than the pool.
            refused = client.post("/v1/completions", json={"prompt": [5] * (21 * 16)})
        assert together == alone
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert small.metric("vllm:num_preemptions_total") > 0
        small.wait_metric("vllm:kv_cache_usage_perc", 0.0)
        small.wait_metric("vllm:num_requests_running", 0.0)
        assert text_of(client, prompt=[5] * (21 * 16 - 1))


@pytest.mark.covers("R18")
@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "num_generated"),
    [
        (CONTEXT - 2, None, 2),
        (CONTEXT - 1, None, 1),
        (CONTEXT, None, None),
        (CONTEXT + 1, None, None),
        (CONTEXT - 1, 1, 1),
        (CONTEXT - 1, 2, None),
        (10, CONTEXT - 9, None),
    ],
)
def test_a_prompt_fills_the_context_to_the_last_token_and_not_beyond(
    server: ServerProcess, num_prompt: int, max_tokens: int | None, num_generated: int | None
) -> None:
    body = {"prompt": [5] * num_prompt, "max_tokens": max_tokens, "ignore_eos": True}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    if num_generated is None:
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert response.json()["usage"]["completion_tokens"] == num_generated
        assert response.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.covers("K09")
def test_128_choices_of_one_cold_prompt_are_one_and_the_same(server: ServerProcess) -> None:
    with server.client() as client:
        [alone] = complete(client, prompt=make_prompt(901, 50), max_tokens=8, cache_salt="alone")["choices"]
        choices = complete(client, prompt=make_prompt(901, 50), max_tokens=8, n=128)["choices"]
    assert len(choices) == 128
    assert {choice["text"] for choice in choices} == {alone["text"]}


def test_clients_that_leave_mid_stream_leave_nothing_behind(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = {"prompt": make_prompt(3), "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True}
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload

    def leave(index: int) -> None:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request)
            while b"data: " not in connection.recv(4096):
                pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(1000)))
    server.wait_metric("vllm:num_requests_running", 0.0)
    server.wait_metric("vllm:num_requests_waiting", 0.0)
    assert server.metric("vllm:kv_cache_usage_perc") == 0.0
    started = time.monotonic()
    with server.client() as client:
        assert text_of(client, prompt="a", max_tokens=1)
    assert time.monotonic() - started < 1.0


@pytest.mark.covers("K08")
def test_a_shared_prefix_is_computed_once(server: ServerProcess) -> None:
    prompt = make_prompt(77, 200)
    with server.client() as client:
        first = complete(client, prompt=prompt, max_tokens=8)
        second = complete(client, prompt=prompt, max_tokens=8)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    # 201 tokens with <bos>: twelve whole blocks of 16.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
    assert second["choices"][0]["text"] == first["choices"][0]["text"]


@pytest.mark.covers("R15", "R16", "R18", "R21", "R22", "R23", "R24", "R25", "R26", "R27")
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "max_tokens": CONTEXT}, "max_tokens"),
        ({"prompt": [1] * CONTEXT}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 1.5}, "top_p"),
        ({"prompt": "a", "n": 10**6}, "n"),
        ({"prompt": "a", "logprobs": 10**6}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
        ({"prompt": "a", "guided_json": {"type": "nonsense"}}, "guided_json"),
    ],
)
def test_bad_input_is_named_and_harms_nobody(
    server: ServerProcess, body: dict[str, Any], param: str | None
) -> None:
    engine = server.engine.pid
    with server.client() as client:
        canary = text_of(client, prompt="abc", max_tokens=8)
        response = client.post("/v1/completions", json=body)
        assert response.status_code in ((200,) if param is None else (400,)), response.text
        if param is not None:
            assert response.json()["error"]["param"] == param
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert text_of(client, prompt="abc", max_tokens=8) == canary
    assert server.engine.pid == engine


@pytest.mark.covers("R34")
def test_echoed_logprobs_are_those_of_generation(server: ServerProcess) -> None:
    with server.client() as client:
        ids = client.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
        scored = complete(client, prompt="abc", max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
        # The bias decides which token is sampled; the log probability is the model's own all the same.
        sampled = [
            complete(client, prompt=ids[:length], max_tokens=1, logprobs=0, logit_bias={str(ids[length]): 100})
            for length in range(1, len(ids))
        ]
    expected = [answer["choices"][0]["logprobs"]["token_logprobs"][0] for answer in sampled]
    assert scored["token_logprobs"][0] is None
    assert scored["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
