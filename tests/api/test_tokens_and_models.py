from __future__ import annotations

from typing import Any

import pytest

from server.chat_template import ChatMessage, render_chat
from tests.api.support import ALIAS, MAX_MODEL_LEN, MODEL, TOKENIZER, VOCAB_SIZE, LiveServer, assert_error


def test_models_lists_each_name(server: LiveServer) -> None:
    body = server.http.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [MODEL, ALIAS]
    assert body["data"][0] == {
        "id": MODEL,
        "created": 1_700_000_000,
        "root": "embedded",
        "max_model_len": MAX_MODEL_LEN,
        "object": "model",
        "owned_by": "gemma-server",
        "parent": None,
        "permission": [],
    }


def test_a_model_is_found_by_a_name_with_slashes(server: LiveServer) -> None:
    assert server.http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    assert server.http.get("/v1/models/google%2Fgemma-tiny").json()["id"] == MODEL
    assert_error(server.http.get("/v1/models/google/other"), 404, param="model", code="model_not_found")


def test_a_text_is_tokenized_as_a_prompt(server: LiveServer) -> None:
    body = server.http.post("/tokenize", json={"prompt": "ab é<eos>"}).json()
    ids = TOKENIZER.encode_prompt("ab é<eos>")
    assert body == {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}


def test_bos_and_strings_are_optional(server: LiveServer) -> None:
    fields = {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True, "model": ALIAS}
    body = server.http.post("/tokenize", json=fields).json()
    assert body["tokens"] == TOKENIZER.encode_text("ab")
    assert "".join(body["token_strs"]) == "ab"


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_is_tokenized_as_it_is_rendered(server: LiveServer, add_generation_prompt: bool) -> None:
    messages = [{"role": "user", "content": "ab"}]
    body = server.http.post(
        "/tokenize", json={"messages": messages, "add_generation_prompt": add_generation_prompt}
    ).json()
    rendered = render_chat([ChatMessage("user", "ab")], TOKENIZER, add_generation_prompt)
    assert body["tokens"] == rendered.token_ids(TOKENIZER)


def test_a_text_longer_than_the_context_can_be_counted(server: LiveServer) -> None:
    assert server.http.post("/tokenize", json={"prompt": "user" * 100}).json()["count"] > MAX_MODEL_LEN


def test_tokens_become_text_again(server: LiveServer) -> None:
    ids = TOKENIZER.encode_prompt("ab é😀")
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "<bos>ab é😀"}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, *["1"] * 20]}, "tokens[1]"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
    ],
)
def test_bad_bodies_are_refused_by_name(
    server: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    assert_error(server.http.post(path, json=body), 400, param=param)


def test_unknown_fields_are_named(server: LiveServer) -> None:
    response = server.http.post("/tokenize", json={"prompt": "a", "frobnicate": 1})
    assert response.headers["x-ignored-fields"] == "frobnicate"
