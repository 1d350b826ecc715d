"""Every number and every list of a request has a limit: what a request can cost is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.support import MAX_MODEL_LEN, VOCAB_SIZE, LiveServer, assert_error

BOUND_LATER = {
    "max_tokens": "what the context leaves",
    "max_completion_tokens": "what the context leaves",
    "max_output_tokens": "what the context leaves",
    "min_tokens": "max_tokens",
    "top_k": "the vocabulary",
    "logprobs": "--max-logprobs",
    "top_logprobs": "--max-logprobs",
    "prompt_logprobs": "--max-logprobs",
}
"""Numbers that the model, the prompt or an option bounds."""
BOUND_BY_THE_BODY = {"content", "output", "tokens", "tools", "include", "system", "tool_calls"}
"""Lists that are read once: what they may hold is bounded by what they are read for."""


@pytest.fixture(scope="module")
def schemas(_shared_server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = _shared_server.http.get("/openapi.json").json()["components"]["schemas"]
    return found


def branches(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for branch in schema.get("anyOf", ()):
        yield from branches(branch)
    if isinstance(schema.get("items"), dict):
        yield from branches(schema["items"])


def requests(schemas: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model, field, schema) of all that clients send."""
    names = {name for name in schemas if name.endswith("Request")}
    while True:
        references = {
            branch["$ref"].rpartition("/")[2]
            for name in names
            for field in schemas[name].get("properties", {}).values()
            for branch in branches(field)
            if "$ref" in branch
        }
        if references <= names:
            break
        names |= references
    for name in sorted(names):
        for field, schema in schemas[name].get("properties", {}).items():
            yield name, field, schema


@pytest.mark.covers("S23")
def test_every_number_has_a_greatest_value(schemas: dict[str, Any]) -> None:
    unbounded = [
        (model, field)
        for model, field, schema in requests(schemas)
        for branch in branches(schema)
        if branch.get("type") in ("integer", "number")
        and not {"maximum", "exclusiveMaximum"} & branch.keys()
        and field not in BOUND_LATER
    ]
    # Token ids are compared with the vocabulary.
    assert {field for _, field in unbounded} <= {
        "prompt",
        "tokens",
        "stop_token_ids",
        "allowed_token_ids",
        "logprob_token_ids",
    }


@pytest.mark.covers("S23")
def test_every_list_has_a_greatest_length(schemas: dict[str, Any]) -> None:
    unbounded = {
        field
        for _, field, schema in requests(schemas)
        for branch in branches(schema)
        if branch.get("type") == "array" and "maxItems" not in branch
    }
    assert unbounded - {"prompt"} <= BOUND_BY_THE_BODY


@pytest.mark.covers("S23", "R20", "R23")
@pytest.mark.parametrize("name", sorted(BOUND_LATER))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_has_no_fixed_limit_is_refused_or_cut_to_what_there_is(
    server: LiveServer, path: str, name: str
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}
    kept = {"prompt"} if path == "/v1/completions" else {"messages"}
    fields = {"logprobs": True} if name == "top_logprobs" else {}
    asked = {**{key: body[key] for key in kept}, **fields, name: 10**18}
    response = server.http.post(path, json=asked)
    if response.status_code == 200:
        for request in server.engine.submitted:
            assert request.params.max_tokens <= MAX_MODEL_LEN
            assert request.params.top_k <= VOCAB_SIZE
    else:
        assert_error(response, 400)
