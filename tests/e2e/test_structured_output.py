"""What comes out under a grammar, from a model that knows nothing and from one that knows a little."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.e2e.schemas import SCHEMAS
from tests.e2e.server_process import ServerProcess, running_server
from tests.fixtures_tokenizers import make_tiny_tokenizer


@pytest.fixture(scope="module")
def embedded() -> Iterator[ServerProcess]:
    with running_server("embedded", "--num-threads", "2") as server:
        yield server


def ask(client: httpx.Client, **fields: Any) -> tuple[str, str]:
    """The answer's text and why it ended."""
    body = {"messages": [{"role": "user", "content": "Answer in JSON."}], "seed": 5, **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def stream(client: httpx.Client, **fields: Any) -> tuple[str, str]:
    """The same, as it comes."""
    body = {"messages": [{"role": "user", "content": "Answer in JSON."}], "seed": 5, **fields, "stream": True}
    text, reason = "", ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
    return text, reason


def check_valid(server: ServerProcess, name: str, temperature: float, max_tokens: int) -> None:
    schema = SCHEMAS[name]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with server.client() as client:
        fields = {"response_format": form, "temperature": temperature, "max_tokens": max_tokens}
        text, reason = ask(client, **fields)
        assert stream(client, **fields) == (text, reason)
    assert reason == "stop", text
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in ("recursion", "number", "map")])
def test_every_text_of_a_model_that_knows_nothing_is_valid(
    server: ServerProcess, name: str, temperature: float
) -> None:
    check_valid(server, name, temperature, 400)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_of_the_embedded_model_is_valid(
    embedded: ServerProcess, name: str, temperature: float
) -> None:
    check_valid(embedded, name, temperature, 1000)


def test_regexes_choices_and_grammars_hold_for_every_choice_of_a_request(server: ServerProcess) -> None:
    forms = {
        r"[a-f]{3}-[0-9]{2}": {"regex": r"[a-f]{3}-[0-9]{2}"},
        "yes|no|日本": {"choice": ["yes", "no", "日本"]},
        r"\(*x\)*": {"grammar": 'start: "x" | "(" start ")"'},
    }
    with server.client() as client:
        for pattern, form in forms.items():
            body = {"prompt": ["a", "b"], "n": 3, "temperature": 1, "max_tokens": 200, "logprobs": 1}
            response = client.post("/v1/completions", json={**body, "structured_outputs": form})
            for choice in response.json()["choices"]:
                assert choice["finish_reason"] == "stop"
                assert re.fullmatch(pattern, choice["text"])


def test_a_grammar_holds_beside_all_other_parameters(server: ServerProcess) -> None:
    with server.client() as client:
        regex = {"structured_outputs": {"regex": "[abc]{6}"}, "max_tokens": 50}
        assert re.fullmatch("[abc]{6}", ask(client, ignore_eos=True, **regex)[0])
        assert re.fullmatch("[abc]{6}", ask(client, min_tokens=40, **regex)[0]), "nothing can follow"
        tokenizer = make_tiny_tokenizer()  # the checkpoint's: its x is a piece, and a byte
        spelt = (token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"x")
        banned = {str(token): -100 for token in spelt}
        others = {"structured_outputs": {"regex": "[xyz]{6}"}, "max_tokens": 50}
        assert re.fullmatch("[yz]{6}", ask(client, logit_bias=banned, **others)[0])
        open_end = {"structured_outputs": {"regex": "[abc]*"}, "max_tokens": 20, "temperature": 1}
        assert ask(client, ignore_eos=True, **open_end)[1] == "length"
        text, reason = ask(client, stop=["cab"], ignore_eos=True, **{**open_end, "max_tokens": 400})
        assert reason == "stop"
        assert re.fullmatch("[abc]*", text)
        assert "cab" not in text


def tokens_of(client: httpx.Client, **fields: Any) -> list[str]:
    """The texts of the tokens of a greedy answer."""
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 80, "logprobs": 0, **fields}
    tokens: list[str] = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
    return tokens


def test_bad_words_and_allowed_tokens_hold(server: ServerProcess) -> None:
    with server.client() as client:
        # What is no character by itself cannot be told as a word.
        counts = Counter(token for token in tokens_of(client) if "\ufffd" not in token)
        common, count = counts.most_common(1)[0]
        assert count > 1
        assert common not in tokens_of(client, bad_words=[common])
        ids = client.post("/tokenize", json={"prompt": "xyz", "add_special_tokens": False}).json()["tokens"]
        text, reason = ask(client, temperature=1, max_tokens=30, allowed_token_ids=ids)
        assert set(text) <= set("xyz")
        assert reason == "length", "no end token was allowed"


@pytest.mark.covers("R27")
def test_streams_go_on_while_hostile_grammars_come(server: ServerProcess) -> None:
    hostile: list[dict[str, Any]] = [
        {"grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1}" for i in range(12_000)) + '\nR12000: "a"'},
        {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(8000)}}},
        {"json": {"enum": [f"value {i}" for i in range(12_000)] * 2}},
        {"json": {"type": "string", "description": "x" * 1_000_000}},
        {"regex": "(" * 10_000 + "a" + ")" * 10_000},
    ]
    longest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        with server.client() as client:
            while not done.is_set():
                body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as response:
                    last = time.monotonic()
                    for _ in response.iter_lines():
                        longest, last = max(longest, time.monotonic() - last), time.monotonic()

    def send(form: dict[str, Any]) -> int:
        with server.client() as client:
            body = {"prompt": "a", "max_tokens": 5, "structured_outputs": form}
            return client.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(len(hostile) + 1) as threads:
        watcher = threads.submit(watch)
        try:
            assert list(threads.map(send, hostile)) == [400] * len(hostile)
        finally:
            done.set()
        watcher.result()
    assert longest < 1.0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_constraints_that_contradict_each_other_are_the_request_s_fault(
    backend: str, tiny_checkpoint: Path
) -> None:
    """Each is fine alone; together they leave nothing behind the first token."""
    (a,), (b,) = (make_tiny_tokenizer().encode_text(text) for text in ("a", "b"))
    body = {"model": "x", "prompt": "a", "max_tokens": 8, "allowed_token_ids": [a], "guided_regex": "ab"}
    options = ("--backend", backend, "--served-model-name", "x")
    with running_server(tiny_checkpoint, *options) as server, server.client() as client:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "contradictory_constraints"
        assert "the 1 tokens" in response.json()["error"]["message"]
        streamed = client.post("/v1/completions", json={**body, "stream": True})
        assert streamed.status_code == 200
        assert '"contradictory_constraints"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        both = client.post("/v1/completions", json={**body, "allowed_token_ids": [a, b]})
        assert both.json()["choices"][0]["text"] == "ab"
