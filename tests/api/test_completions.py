from __future__ import annotations

from typing import Any

import pytest

from tests.api.support import EOS, MODEL, TOKENIZER, LiveServer, chunks

BOS = TOKENIZER.bos_id


def test_a_text_is_continued_in_openai_s_shape(server: LiveServer) -> None:
    body = server.complete("ab us", model=MODEL, max_tokens=3).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert choice["text"] == TOKENIZER.decode(TOKENIZER.encode_text(server.script.text)[:3])
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert server.engine.submitted[0].prompt_token_ids == [BOS, *TOKENIZER.encode_text("ab us")]
    assert body["usage"]["prompt_tokens"] == len(server.engine.submitted[0].prompt_token_ids)
    assert body["usage"]["completion_tokens"] == 3


def test_sixteen_tokens_are_the_default_and_fewer_where_fewer_fit(server: LiveServer) -> None:
    server.complete("ab")
    server.complete([BOS] * 50)
    assert [request.params.max_tokens for request in server.engine.submitted] == [16, 10]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, *TOKENIZER.encode_text("ab")]]),
        ("<bos><eos>", [[BOS, EOS]]),
        ("", [[BOS]]),
        (["ab", "us"], [[BOS, *TOKENIZER.encode_text("ab")], [BOS, *TOKENIZER.encode_text("us")]]),
        ([7, 9], [[7, 9]]),
        ([[7, 9], [8]], [[7, 9], [8]]),
    ],
)
def test_prompts_come_in_four_forms(server: LiveServer, prompt: Any, expected: list[list[int]]) -> None:
    body = server.complete(prompt).json()
    assert [request.prompt_token_ids for request in server.engine.submitted] == expected
    assert len(body["choices"]) == len(expected)


def test_choices_are_numbered_by_prompt_then_by_choice(server: LiveServer) -> None:
    body = server.complete(["a", "b"], n=2, seed=5, echo=True).json()
    assert [(choice["index"], choice["text"][0]) for choice in body["choices"]] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    # A prompt's choices do not depend on what else is in the request.
    assert sorted(request.params.seed for request in server.engine.submitted) == [5, 5, 6, 6]
    assert body["usage"]["prompt_tokens"] == 4


def test_echo_shows_the_prompt_as_it_was_typed(server: LiveServer) -> None:
    assert (
        server.complete("  <bos> x\ty", echo=True, max_tokens=1)
        .json()["choices"][0]["text"]
        .startswith("  <bos> x\ty")
    )
    ids = TOKENIZER.encode_text("é日")
    assert server.complete([BOS, *ids], echo=True).json()["choices"][0]["text"].startswith("<bos>é日")


def test_logprobs_have_openai_s_old_shape(server: LiveServer) -> None:
    server.script.text = "日aé"
    body = server.complete("ab", logprobs=1, max_tokens=3).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["日", "a", "é"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"日": -0.5}, {"a": -0.5}, {"é": -0.5}],
        "text_offset": [0, 1, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_logprobs_cover_prompt_and_output(server: LiveServer, stream: bool) -> None:
    server.script.text = "us"
    fields: dict[str, Any] = {"logprobs": 1, "echo": True, "max_tokens": 2, "ignore_eos": True}
    if stream:
        parts = [chunk["choices"][0] for chunk in chunks(server.complete("é日", stream=True, **fields))]
    else:
        parts = server.complete("é日", **fields).json()["choices"]
    text = "".join(part["text"] for part in parts)
    merged: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in part["logprobs"].items():
            merged.setdefault(name, []).extend(values)
    assert text.startswith("é日us")
    num_prompt = 1 + len(TOKENIZER.encode_text("é日"))
    assert merged["tokens"][: num_prompt + 1] == [
        "<bos>",
        *map(TOKENIZER.token_text, TOKENIZER.encode_text("é日us")),
    ]
    assert merged["token_logprobs"][0] is None
    assert merged["top_logprobs"][0] is None
    assert None not in merged["token_logprobs"][1:]
    # <bos> is not in the echoed text, so that the first typed character is at 0.
    assert merged["text_offset"][:2] == [0, 0]
    for token, offset in list(zip(merged["tokens"], merged["text_offset"], strict=True))[1 : num_prompt + 1]:
        assert text[offset:].startswith(token)
    assert server.engine.submitted[0].params.prompt_logprobs == 1


def test_echoed_logprobs_survive_output_that_is_held_back_at_first(server: LiveServer) -> None:
    server.script.text = "abc"
    choice = server.complete("us", logprobs=0, echo=True, stop="ax").json()["choices"][0]
    assert choice["text"] == "usabc"
    num_prompt = 1 + len(TOKENIZER.encode_text("us"))
    assert len(choice["logprobs"]["tokens"]) > num_prompt
    held_back = server.complete("us", logprobs=0, echo=True, stop="abcd", max_tokens=3).json()["choices"][0]
    assert held_back["text"] == "usabc"
    assert held_back["logprobs"]["token_logprobs"][0] is None
    assert len(held_back["logprobs"]["tokens"]) > num_prompt


def test_offsets_of_a_typed_bos_count_it(server: LiveServer) -> None:
    logprobs = server.complete("<bos>a", logprobs=0, echo=True, max_tokens=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<bos>", "a"]
    assert logprobs["text_offset"] == [0, 5]


def test_offsets_of_a_character_of_several_tokens_are_the_character_s(server: LiveServer) -> None:
    logprobs = server.complete("a😀b", logprobs=0, echo=True, max_tokens=0).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1, 2]


@pytest.mark.covers("R34")
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_output(server: LiveServer, stream: bool) -> None:
    fields: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        parts = chunks(server.complete("ab", stream=True, stream_options={"include_usage": True}, **fields))
        usage = parts.pop()["usage"]
        (choice,) = (part["choices"][0] for part in parts)
    else:
        body = server.complete("ab", **fields).json()
        usage = body["usage"]
        (choice,) = body["choices"]
    assert choice["text"] == "ab"
    assert choice["finish_reason"] == "length"
    assert choice["stop_reason"] is None
    assert choice["logprobs"]["tokens"] == ["<bos>", *map(TOKENIZER.token_text, TOKENIZER.encode_text("ab"))]
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"]
    assert server.engine.submitted[0].params.max_tokens == 1


@pytest.mark.covers("H10")
def test_a_stream_says_what_the_whole_answer_says(server: LiveServer) -> None:
    fields: dict[str, Any] = {"n": 2, "echo": True, "logprobs": 1}
    whole = server.complete(["a", "b"], **fields).json()
    options = {"include_usage": True}
    stream = chunks(server.complete(["a", "b"], stream=True, stream_options=options, **fields))
    assert stream[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in stream[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in mine for value in part["logprobs"][name]] == values


def test_continuous_usage_grows_with_the_stream(server: LiveServer) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    stream = chunks(server.complete("ab", max_tokens=3, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in stream] == [1, 2, 3, 3]
    assert [len(chunk["choices"]) for chunk in stream] == [1, 1, 1, 0]
