"""What one request can cost: every amount that it names has a limit, and together they stay below one."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.api import openapi
from tests.api.support import MAX_SEQUENCE_TOKENS, VOCAB_SIZE, LiveServer, assert_error, live_server

MAX_SEQUENCES = 8
MAX_LOGPROBS = 20
BY_MODEL = {
    "max_tokens": "context",
    "max_completion_tokens": "context",
    "max_output_tokens": "context",
    "min_tokens": "max_tokens",
    "logprobs": "--max-logprobs",
    "top_logprobs": "--max-logprobs",
    "prompt_logprobs": "--max-logprobs",
    "top_k": "vocabulary",
    "prompt.[]": "vocabulary",
    "prompt.[].[]": "vocabulary",
    "tokens.[]": "vocabulary",
    "allowed_token_ids.[]": "vocabulary",
    "logprob_token_ids.[]": "vocabulary",
    "stop_token_ids.[]": "vocabulary",
}
"""Numbers whose greatest value the schema does not give, and what gives it: the model or an option."""
READ_ONCE = {"content", "instances", "output", "prompt", "tokens", "tools", "include", "system"}
"""Lists that the size of the body bounds, or what they are read for."""


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(max_queued_requests=MAX_SEQUENCES) as live:
        yield live


def values(
    schema: dict[str, Any], definitions: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The path and the schema of each."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if path.count(name) < 2:
            yield from values(definitions[name], definitions, (*path, name))
        return
    yield ".".join(part for part in path if part not in definitions), schema
    for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from values(branch, definitions, path)
    for name, field in schema.get("properties", {}).items():
        yield from values(field, definitions, (*path, name))
    for key, part in (("items", "[]"), ("additionalProperties", "*")):
        if isinstance(schema.get(key), dict):
            yield from values(schema[key], definitions, (*path, part))


def unlimited(model: type[BaseModel], types: set[str], limits: set[str]) -> set[str]:
    """The paths of the model's values of these types that have none of the limits."""
    schema = model.model_json_schema()
    return {
        path
        for path, value in values(schema, schema.get("$defs", {}))
        if value.get("type") in types and not limits & value.keys()
    }


@pytest.mark.covers("S23")
def test_every_number_in_a_body_has_a_greatest_value_or_is_known_to_get_it_from_the_model() -> None:
    assert len(openapi._requests) > 8
    for model in openapi._requests:
        found = unlimited(model, {"integer", "number"}, {"maximum", "exclusiveMaximum", "enum"})
        assert found <= set(BY_MODEL), model.__name__


@pytest.mark.covers("S23")
def test_every_list_in_a_body_has_a_greatest_length_or_is_read_but_once() -> None:
    for model in openapi._requests:
        names = {
            path.removesuffix(".[]").rpartition(".")[2] for path in unlimited(model, {"array"}, {"maxItems"})
        }
        assert names <= READ_ONCE, model.__name__


@pytest.mark.covers("S23", "R20", "R23")
@pytest.mark.parametrize("name", [name for name in BY_MODEL if name != "max_output_tokens"])
def test_a_number_beyond_what_the_model_allows_is_refused_at_once(server: LiveServer, name: str) -> None:
    field, value = name.partition(".")[0], 2**62
    nested: Any = value
    for _ in range(name.count("[]")):
        nested = [nested]
    body: dict[str, Any] = {"prompt": "ab", field: nested}
    if field == "logprob_token_ids":
        body["logprobs"] = 1
    path = {"tokens": "/detokenize"}.get(field, "/v1/completions")
    if field in ("max_completion_tokens", "top_logprobs"):
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "ab"}]
        body["logprobs"] = True
        del body["prompt"]
    if field == "tokens":
        del body["prompt"]
    started = time.monotonic()
    response = server.http.post(path, json=body)
    assert time.monotonic() - started < 1
    if field == "top_k":  # as many as there are, which costs nothing
        assert response.status_code == 200
        return
    assert_error(response, 400)


@pytest.mark.covers("S23", "R22")
def test_no_mix_of_amounts_makes_more_work_than_the_limits_together(server: LiveServer) -> None:
    chance = random.Random(11)
    amounts: dict[str, list[Any]] = {
        "prompt": [
            ["a" * length for length in range(1, 10)],
            ["a"] * 500,
            ["a" * 58] * 8,
            "ab" * 40,
            [[1] * 59] * 4,
            [[1] * 60],
            [[1] * 5000] * 4,
        ],
        "n": [2, 8, 9, 128],
        "best_of": [8, 20],
        "max_tokens": [1, 30, 58, 60, 2**62],
        "logprobs": [5, 20, 21],
        "prompt_logprobs": [20, 10**9],
        "top_k": [10**9],
        "min_tokens": [1, 10**9],
        "stop": [["x"] * 4, ["x" * 1000] * 4, ["x"] * 5000],
        "logit_bias": [{str(token_id): 1 for token_id in range(VOCAB_SIZE)}, dict.fromkeys("abc", 1)],
        "bad_words": [["abc"] * 5, ["abc"] * 20_000],
        "truncate_prompt_tokens": [-1, 5, 10**9],
        "echo": [True],
    }
    statuses = []
    for _ in range(80):
        server.engine.submitted.clear()
        body = {"prompt": "ab"}
        for name in chance.sample(sorted(amounts), chance.randrange(1, 5)):
            body[name] = chance.choice(amounts[name])
        started = time.monotonic()
        response = server.http.post("/v1/completions", json=body)
        assert time.monotonic() - started < 2
        statuses.append(response.status_code)
        assert response.status_code in (200, 400), response.text
        assert len(server.engine.submitted) <= MAX_SEQUENCES
        for request in server.engine.submitted:
            params = request.params
            assert len(request.prompt_token_ids) + params.max_tokens <= MAX_SEQUENCE_TOKENS
            assert max(params.logprobs or 0, params.prompt_logprobs or 0) <= MAX_LOGPROBS
            assert len(params.logit_bias) <= 1024
            assert sum(map(len, params.bad_words)) <= 10_000
    assert 10 < statuses.count(200) < 70, "the mix shows nothing"
