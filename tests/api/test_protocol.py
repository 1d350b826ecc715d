"""Every field of a request's body is explained, and acts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import BaseModel

from server.api import ignored_fields
from server.api.field_types import WireModel
from server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from server.engine.types import GenerateRequest
from tests.api.support import TOKENIZER, LiveServer, live_server


def subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


BODIES = sorted(
    {model for model in subclasses(BaseModel) if model.__module__.startswith("server.api.")} - {WireModel},
    key=lambda model: model.__name__,
)
"""Of all routes, and what is in them."""
FIELDS = [(model, name) for model in BODIES for name in model.model_fields]


@pytest.fixture(scope="module")
def roomy() -> Iterator[LiveServer]:
    """Tools take more tokens than the shared server's context has."""
    with live_server(max_model_len=4096) as live:
        yield live


@pytest.fixture(scope="module")
def document(_shared_server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = _shared_server.http.get("/openapi.json").json()
    return found


def branches(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for branch in schema.get("anyOf", ()):
        yield from branches(branch)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_the_page_explains_each_field_with_its_range_and_default(
    document: dict[str, Any], model: type[BaseModel], name: str
) -> None:
    if model.__name__ not in document["components"]["schemas"]:
        assert model is GenerationFields, "part of no request"
        return
    field = model.model_fields[name]
    schema = document["components"]["schemas"][model.__name__]["properties"][field.alias or name]
    description = schema.get("description", "")
    sentences = [sentence.strip() for sentence in description.removesuffix(".").split(". ")]
    last = sentences[-1]
    assert len(sentences) > 1, f"nothing but {last!r} is said of it"
    if field.is_required():
        assert last == "Required"
        return
    assert last.startswith("Default: "), "say what holds without the field"
    if isinstance(field.default, bool):
        assert last == f"Default: {str(field.default).lower()}"
    for branch in branches(schema):
        if branch.get("type") in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & branch.keys(), "a number without a range"


# --- every field acts ----------------------------------------------------------------------------------------

ASSISTANT_LAST = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "us"}]

Example = tuple[dict[str, Any], Any]
"""What else the request says, and a value that changes what happens."""

COMMON: dict[str, Example] = {
    "model": ({}, "nope"),
    "temperature": ({}, 0.5),
    "top_p": ({}, 0.5),
    "top_k": ({}, 5),
    "min_p": ({}, 0.5),
    "seed": ({}, 8),
    "presence_penalty": ({}, 1),
    "frequency_penalty": ({}, 1),
    "repetition_penalty": ({}, 1.5),
    "logit_bias": ({}, {"9": 1}),
    "stop": ({}, "us"),
    "stop_token_ids": ({}, [TOKENIZER.bos_id]),
    "include_stop_str_in_output": ({"stop": "us"}, True),
    "skip_special_tokens": ({}, False),
    "min_tokens": ({}, 1),
    "ignore_eos": ({}, True),
    "n": ({}, 2),
    "stream": ({}, True),
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "prompt_logprobs": ({}, 0),
    "return_token_ids": ({}, True),
    "truncate_prompt_tokens": ({}, 2),
    "truncation_side": ({"truncate_prompt_tokens": 2}, "right"),
    "priority": ({}, 5),
    "cache_salt": ({}, "salt"),
    "allowed_token_ids": ({}, [9]),
    "bad_words": ({}, ["us"]),
    "response_format": ({}, {"type": "json_object"}),
    "structured_outputs": ({}, {"regex": "a"}),
    "guided_json": ({}, {"type": "object"}),
    "guided_regex": ({}, "a"),
    "guided_choice": ({}, ["a"]),
    "guided_grammar": ({}, 'start: "a"'),
    "guided_json_object": ({}, True),
}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT: dict[str, Example] = COMMON | {
    "messages": ({}, [{"role": "user", "content": "x"}]),
    "max_tokens": ({}, 3),
    "max_completion_tokens": ({"max_tokens": 4}, 3),
    "logprobs": ({}, True),
    "top_logprobs": ({"logprobs": True}, 1),
    "logprob_token_ids": ({"logprobs": True}, [9]),
    "return_tokens_as_token_ids": ({"logprobs": True}, True),
    "add_generation_prompt": ({}, False),
    "continue_final_message": ({"messages": ASSISTANT_LAST}, True),
    "echo": ({"messages": ASSISTANT_LAST}, True),
    "tools": ({}, TOOLS),
    "tool_choice": ({"tools": TOOLS}, "none"),
    "parallel_tool_calls": ({"tools": TOOLS}, False),
}
COMPLETION: dict[str, Example] = COMMON | {
    "prompt": ({}, "x"),
    "suffix": ({}, "x"),
    "max_tokens": ({}, 3),
    "logprobs": ({}, 0),
    "logprob_token_ids": ({"logprobs": 0}, [9]),
    "return_tokens_as_token_ids": ({"logprobs": 0}, True),
    "echo": ({}, True),
    "best_of": ({}, 2),
    "add_special_tokens": ({}, False),
}
ROUTES: dict[type[BaseModel], tuple[str, dict[str, Any], dict[str, Example]]] = {
    ChatCompletionRequest: ("/v1/chat/completions", {"messages": ASSISTANT_LAST[:1]}, CHAT),
    CompletionRequest: ("/v1/completions", {"prompt": "ab us"}, COMPLETION),
}


def what_happens(server: LiveServer, route: str, body: dict[str, Any]) -> tuple[httpx.Response, Any]:
    """The response, and what was asked of the engine and answered, without names and times."""
    server.engine.submitted.clear()
    response = server.http.post(route, json={"seed": 7, **body})
    asked: list[GenerateRequest] = [
        msgspec.structs.replace(request, request_id="") for request in server.engine.submitted
    ]
    answered = [
        {name: value for name, value in chunk.items() if name not in ("id", "created")}
        for chunk in map(
            msgspec.json.decode,
            [line.removeprefix("data: ") for line in response.text.split("\n\n") if "{" in line],
        )
    ]
    return response, (asked, answered)


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model in ROUTES for name in model.model_fields],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_field_of_a_generating_request_acts(roomy: LiveServer, model: type[BaseModel], name: str) -> None:
    roomy.script.token_ids = TOKENIZER.encode_controls("us<bos> ab<eos>")
    route, body, examples = ROUTES[model]
    assert name in examples, f"{name} has no example of what it does"
    others, value = examples[name]
    before, without = what_happens(roomy, route, body | others)
    response, with_it = what_happens(roomy, route, body | others | {name: value})
    assert before.status_code == 200
    assert "x-ignored-fields" not in response.headers
    assert with_it != without


def test_fields_that_act_in_every_generating_request_are_in_no_list_of_those_that_do_not() -> None:
    everywhere = ChatCompletionRequest.model_fields.keys() & CompletionRequest.model_fields.keys()
    assert not ignored_fields._INERT & everywhere
    assert not ignored_fields._UNSUPPORTED.keys() & everywhere
