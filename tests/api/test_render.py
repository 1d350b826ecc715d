"""The prompts that requests become."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.support import TOKENIZER, LiveServer, assert_error


def render_chat(server: LiveServer, *messages: tuple[str, Any], **fields: Any) -> httpx.Response:
    listed = [{"role": role, "content": text} for role, text in messages]
    return server.http.post("/v1/chat/completions/render", json={"messages": listed, **fields})


def test_a_rendered_chat_is_what_the_engine_gets(server: LiveServer) -> None:
    messages = [("system", "ab"), ("user", "a<end_of_turn>"), ("user", "b")]
    shown = render_chat(server, *messages).json()
    listed = [{"role": role, "content": text} for role, text in messages]
    server.http.post("/v1/chat/completions", json={"messages": listed})
    assert shown["token_ids"] == server.engine.submitted[0].prompt_token_ids
    assert shown["count"] == len(shown["token_ids"])
    assert shown["prompt"] == (
        "<bos><start_of_turn>user\nab\n\na<end_of_turn>\n\nb<end_of_turn>\n<start_of_turn>model\n"
    )
    assert shown["token_ids"].count(TOKENIZER.end_of_turn_id) == 1
    assert shown["notes"] == [
        "messages[0] (system) was folded into the user turn of messages[1]",
        "messages[2] was merged into the user turn of messages[1]",
    ]
    assert len(server.engine.submitted) == 1


def test_a_plain_chat_has_no_notes_and_a_cut_one_says_so(server: LiveServer) -> None:
    assert render_chat(server, ("user", "ab")).json()["notes"] == []
    shown = render_chat(server, ("user", "a b " * 8), truncate_prompt_tokens=10).json()
    assert shown["count"] == 10
    assert "truncate_prompt_tokens" in shown["notes"][0]
    assert (
        render_chat(server, ("user", "ab"), add_generation_prompt=False)
        .json()["prompt"]
        .endswith("<end_of_turn>\n")
    )


def test_rendered_prompts_are_what_the_engine_gets(server: LiveServer) -> None:
    body = {"prompt": ["ab", "<bos>model"], "truncate_prompt_tokens": 2, "max_tokens": 1}
    shown = server.http.post("/v1/completions/render", json=body).json()
    server.http.post("/v1/completions", json=body)
    sent = sorted(request.prompt_token_ids for request in server.engine.submitted)
    assert sorted(prompt["token_ids"] for prompt in shown["data"]) == sent
    assert shown["object"] == "list"
    ids = server.http.post("/v1/completions/render", json={"prompt": [2, 300]}).json()["data"][0]
    assert (ids["token_ids"], ids["notes"]) == ([2, 300], [])


@pytest.mark.parametrize("path", ["/v1/chat/completions/render", "/v1/completions/render"])
def test_what_cannot_be_rendered_is_refused(server: LiveServer, path: str) -> None:
    assert_error(server.http.post(path, json={}), 400, code="missing_required_parameter")
    body: dict[str, Any] = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "model": "nope"}
    assert_error(server.http.post(path, json=body), 404, param="model")


def test_tokens_are_counted_under_either_path(server: LiveServer) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        assert server.http.post(path, json={"prompt": "ab"}).json()["tokens"] == TOKENIZER.encode_prompt("ab")
    for path in ("/detokenize", "/v1/detokenize"):
        assert server.http.post(path, json={"tokens": TOKENIZER.encode_text("ab")}).json() == {"prompt": "ab"}
