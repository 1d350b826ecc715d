"""What may be asked for beside the text: log probabilities, ranks and token ids; and the best of several."""

from __future__ import annotations

from typing import Any

import pytest

from server.chat_template import ChatMessage, render_chat
from tests.api.support import END_OF_TURN, EOS, TOKENIZER, LiveServer, assert_error, chunks

BOS = TOKENIZER.bos_id
AB = TOKENIZER.encode_text("ab")
OUTPUT = [*TOKENIZER.encode_text("ab user 日 model"), END_OF_TURN]


def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": TOKENIZER.token_text(token_id)}


def test_the_prompt_s_logprobs_are_those_of_its_tokens_and_of_the_likeliest_by_id(server: LiveServer) -> None:
    body = server.complete("ab", prompt_logprobs=2, max_tokens=1).json()
    expected = [
        None,
        *({str(token_id): entry(token_id, -0.5, 1), str(EOS): entry(EOS, -9999.0, 2)} for token_id in AB),
    ]
    assert body["choices"][0]["prompt_logprobs"] == expected
    assert body["choices"][0]["logprobs"] is None

    prompt = render_chat([ChatMessage("user", "ab")], TOKENIZER).token_ids(TOKENIZER)
    chat = server.chat("ab", prompt_logprobs=0, n=2).json()
    assert chat["prompt_logprobs"] == [
        None,
        *({str(token_id): entry(token_id, -0.5, 1)} for token_id in prompt[1:]),
    ]


def test_who_asks_for_nothing_more_gets_openai_s_fields_alone(server: LiveServer) -> None:
    for answer in (server.chat().json(), server.complete().json()):
        (choice,) = answer["choices"]
        for name in ("prompt_logprobs", "prompt_token_ids", "token_ids"):
            assert name not in answer
            assert name not in choice


def test_the_prompt_s_logprobs_are_not_streamed(server: LiveServer) -> None:
    for response in (
        server.chat(prompt_logprobs=0, stream=True),
        server.complete(prompt_logprobs=0, stream=True),
    ):
        assert "stream" in assert_error(response, 400, param="prompt_logprobs")


def test_echo_and_the_prompt_s_logprobs_each_have_as_many_alternatives_as_they_ask_for(
    server: LiveServer,
) -> None:
    choice = server.complete("ab", echo=True, logprobs=0, prompt_logprobs=2, max_tokens=0).json()["choices"][0]
    assert [len(top) for top in choice["prompt_logprobs"][1:]] == [2] * len(AB)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * len(AB)
    choice = server.complete("ab", echo=True, logprobs=2, prompt_logprobs=0, max_tokens=0).json()["choices"][0]
    assert [len(top) for top in choice["prompt_logprobs"][1:]] == [1] * len(AB)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2] * len(AB)
    assert [request.params.prompt_logprobs for request in server.engine.submitted] == [2, 2]


def test_a_prompt_can_be_scored_without_an_echo(server: LiveServer) -> None:
    body = server.complete("ab", prompt_logprobs=0, max_tokens=0, return_token_ids=True).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("", "length", [])
    assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"]) == 1 + len(AB)
    assert body["usage"]["completion_tokens"] == 0


def test_a_long_prompt_s_logprobs_are_written_in_a_thread_all_the_same(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"prompt_logprobs": 2, "echo": True, "logprobs": 1}
    inline = server.complete("ab", **fields).json()["choices"]
    monkeypatch.setattr("server.api.logprobs.INLINE_ENTRIES", 0)
    assert server.complete("ab", **fields).json()["choices"] == inline


def test_tokens_named_by_id_are_reported_behind_the_likeliest(server: LiveServer) -> None:
    named = [*TOKENIZER.encode_text("us"), EOS]
    asked: dict[str, Any] = {"logprob_token_ids": named, "max_tokens": 1}
    chat = server.chat(logprobs=True, top_logprobs=1, **asked).json()["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in chat[0]["top_logprobs"]] == ["ab", "us", "<eos>"]
    old = server.complete(logprobs=0, **asked).json()["choices"][0]["logprobs"]
    assert old["top_logprobs"] == [{"us": -float(named[0]), "<eos>": -float(EOS), "ab": -0.5}]
    assert [request.params.logprob_token_ids for request in server.engine.submitted] == [tuple(named)] * 2


def test_tokens_named_by_id_need_logprobs(server: LiveServer) -> None:
    for ask in (server.chat, server.complete):
        assert "logprobs" in assert_error(ask(logprob_token_ids=[5]), 400, param="logprob_token_ids")
        assert ask(logprob_token_ids=[]).status_code == 200


def test_tokens_are_written_as_ids_where_that_is_asked_for(server: LiveServer) -> None:
    fields: dict[str, Any] = {"return_tokens_as_token_ids": True, "max_tokens": 1}
    (token,) = server.chat(logprobs=True, top_logprobs=1, **fields).json()["choices"][0]["logprobs"]["content"]
    name = f"token_id:{OUTPUT[0]}"
    assert (token["token"], token["bytes"]) == (name, list(b"ab"))
    assert token["top_logprobs"][0]["token"] == name
    logprobs = server.complete("us", logprobs=1, echo=True, **fields).json()["choices"][0]["logprobs"]
    ids = [BOS, *TOKENIZER.encode_text("us"), OUTPUT[0]]
    assert logprobs["tokens"] == [f"token_id:{token_id}" for token_id in ids]
    assert logprobs["top_logprobs"][-1] == {name: -0.5}
    assert logprobs["text_offset"] == [0, 0, 2]


@pytest.mark.parametrize(
    ("fields", "ends_with_stop_token"),
    [
        ({}, True),
        ({"include_stop_str_in_output": True}, True),
        ({"stop": ["us"]}, False),
        ({"stop": "日"}, False),
        ({"max_tokens": 3}, False),
        ({"ignore_eos": True}, False),
    ],
)
def test_token_ids_are_those_that_were_read_and_generated(
    server: LiveServer, fields: dict[str, Any], ends_with_stop_token: bool
) -> None:
    prompt = render_chat([ChatMessage("user", "ab")], TOKENIZER).token_ids(TOKENIZER)
    fields = {"max_tokens": 20, "return_token_ids": True} | fields
    chat = server.chat("ab", **fields).json()
    assert chat["prompt_token_ids"] == prompt
    ids = chat["choices"][0]["token_ids"]
    assert ids == (OUTPUT * 3)[: len(ids)]
    assert len(ids) == chat["usage"]["completion_tokens"]
    assert (ids[-1] == END_OF_TURN) == ends_with_stop_token
    old = server.complete("ab", **fields).json()["choices"][0]
    assert (old["prompt_token_ids"], old["token_ids"]) == ([BOS, *AB], ids)

    parts = chunks(server.chat("ab", stream=True, n=2, **fields))
    assert [part.get("prompt_token_ids") for part in parts] == [prompt] + [None] * (len(parts) - 1)
    for index in range(2):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert [token_id for part in mine for token_id in part.get("token_ids", [])] == ids
    parts = [part["choices"][0] for part in chunks(server.complete("ab", stream=True, **fields))]
    assert [part.get("prompt_token_ids") for part in parts] == [[BOS, *AB]] + [None] * (len(parts) - 1)
    assert [token_id for part in parts for token_id in part["token_ids"]] == ids


def test_control_tokens_are_shown_where_that_is_asked_for(server: LiveServer) -> None:
    server.script.token_ids = TOKENIZER.encode_controls("a<bos>b")
    fields: dict[str, Any] = {"logprobs": 0, "skip_special_tokens": False}
    choice = server.complete("x", **fields).json()["choices"][0]
    assert choice["text"] == "a<bos>b"
    assert choice["logprobs"]["text_offset"] == [0, 1, 6]
    kept = server.complete("x", include_stop_str_in_output=True, **fields).json()["choices"][0]
    assert kept["text"] == "a<bos>b<end_of_turn>"
    streamed = chunks(server.chat(skip_special_tokens=False, stream=True))
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in streamed) == "a<bos>b"
    hidden = server.complete("x", logprobs=0).json()["choices"][0]
    assert hidden["text"] == "ab"
    assert hidden["logprobs"]["text_offset"] == [0, 1, 1]


def test_the_best_of_several_are_returned_best_first(server: LiveServer) -> None:
    server.script.logprob_of_seed = {5: -3.0, 6: -1.0, 7: -2.0, 8: -4.0}
    fields: dict[str, Any] = {"n": 2, "best_of": 4, "seed": 5, "max_tokens": 3, "echo": True}
    body = server.complete(["a", "b"], logprobs=0, **fields).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in body["choices"]] == ["a", "a", "b", "b"]
    assert [choice["logprobs"]["token_logprobs"][-1] for choice in body["choices"]] == [-1.0, -2.0, -1.0, -2.0]
    assert body["usage"]["completion_tokens"] == 2 * 4 * 3
    assert body["usage"]["prompt_tokens"] == 4
    without = server.complete("a", **fields).json()
    assert [choice["logprobs"] for choice in without["choices"]] == [None, None]
    assert server.engine.submitted[-1].params.logprobs == 0


def test_best_of_n_is_n(server: LiveServer) -> None:
    body = server.complete("a", n=2, best_of=2, seed=1).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert server.complete("a", n=2, best_of=2, stream=True).status_code == 200
    assert all(request.params.logprobs is None for request in server.engine.submitted)


def test_best_of_more_than_the_server_holds_is_refused(server: LiveServer) -> None:
    assert_error(server.complete(["a"] * 9, best_of=128), 400, param="n")
    assert server.engine.submitted == []


def test_a_priority_reaches_the_engine_with_every_choice(server: LiveServer) -> None:
    server.chat(priority=-3, n=2)
    server.complete(["a", "b"], priority=2**62)
    server.complete()
    priorities = [request.priority for request in server.engine.submitted]
    assert priorities == [-3, -3, 2**62, 2**62, 0]
