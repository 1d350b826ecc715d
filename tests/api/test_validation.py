"""What a client may not ask for is a 400 that names the parameter, and never reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest

from server.api import ignored_fields
from tests.api.support import (
    EOS,
    MAX_MODEL_LEN,
    MAX_SEQUENCE_TOKENS,
    TOKENIZER,
    VOCAB_SIZE,
    LiveServer,
    assert_error,
    live_server,
)

BOS = TOKENIZER.bos_id
USER = [{"role": "user", "content": "hi"}]

BAD_COMMON_FIELDS = [
    {"temperature": -0.1},
    {"temperature": 2.1},
    {"temperature": "1"},
    {"temperature": True},
    {"temperature": 1e308},
    {"top_p": -0.1},
    {"top_p": 1.1},
    {"top_k": -2},
    {"top_k": 1.5},
    {"min_p": -0.1},
    {"min_p": 2},
    {"presence_penalty": 2.1},
    {"presence_penalty": -1e9},
    {"frequency_penalty": -2.1},
    {"repetition_penalty": 0},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 2.1},
    {"seed": 2**63},
    {"seed": -(2**63) - 1},
    {"seed": 1.5},
    {"n": 0},
    {"n": 129},
    {"n": 10**18},
    {"n": "2"},
    {"stop": ""},
    {"stop": [""]},
    {"stop": ["a"] * 5},
    {"stop": ["a"] * 100_000},
    {"stop": "a" * 1_000_000},
    {"stop": 5},
    {"stop": [5]},
    {"stop_token_ids": [VOCAB_SIZE]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [2**63]},
    {"stop_token_ids": ["5"]},
    {"stop_token_ids": list(range(257))},
    {"logit_bias": {str(VOCAB_SIZE): 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"abc": 1}},
    {"logit_bias": {"1_0": 1}},
    {"logit_bias": {"²": 1}},
    {"logit_bias": {"9" * 5000: 1}},
    {"logit_bias": {"5": 101}},
    {"logit_bias": {"5": -1e308}},
    {"logit_bias": {"5": "1"}},
    {"logit_bias": {"5": True}},
    {"logit_bias": [5]},
    {"logit_bias": {str(key): 1 for key in range(1025)}},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": 10**18},
    {"max_tokens": "5"},
    {"max_tokens": 1.5},
    {"min_tokens": -1},
    {"min_tokens": 10, "max_tokens": 9},
    {"min_tokens": 10**9},
    {"stream": "yes"},
    {"stream_options": {"include_usage": 1}, "stream": True},
    {"stream_options": [], "stream": True},
    {"cache_salt": ""},
    {"prompt_logprobs": -1},
    {"prompt_logprobs": 21},
    {"prompt_logprobs": True},
    {"logprob_token_ids": [VOCAB_SIZE]},
    {"logprob_token_ids": [-1]},
    {"logprob_token_ids": [5]},
    {"logprob_token_ids": list(range(257))},
    {"return_token_ids": 1},
    {"return_tokens_as_token_ids": "yes"},
    {"skip_special_tokens": 0},
    {"truncate_prompt_tokens": 0},
    {"truncate_prompt_tokens": -2},
    {"truncate_prompt_tokens": 10**30},
    {"truncation_side": "middle"},
    {"priority": 2**63},
    {"priority": -(2**63) - 1},
    {"priority": 0.5},
    {"cache_salt": "a" * 129},
    {"model": ["tiny"]},
    {"model": {}},
    {"model": 3},
]
BAD_CHAT_FIELDS = [
    {"messages": None},
    {"messages": []},
    {"messages": "hi"},
    {"messages": ["hi"]},
    {"messages": {}},
    {"messages": [{}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": {}}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": 3, "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    {"messages": [{"role": "user", "content": ["x"]}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
    {"messages": USER * 10_001},
    {"max_completion_tokens": 0},
    {"max_completion_tokens": 10**18},
    {"logprobs": 5},
    {"top_logprobs": 1},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": True, "top_logprobs": -1},
    {"logprobs": True, "logprob_token_ids": [VOCAB_SIZE]},
    {"suffix": "x"},
    {"add_special_tokens": True},
    {"continue_final_message": True},
    {"continue_final_message": True, "add_generation_prompt": True},
    {"add_generation_prompt": "yes"},
]
BAD_COMPLETION_FIELDS = [
    {"prompt": None},
    {"prompt": 5},
    {"prompt": {}},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": ["a", 5]},
    {"prompt": [5, "a"]},
    {"prompt": [[5], "a"]},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": [[5, None]]},
    {"prompt": [-1]},
    {"prompt": [VOCAB_SIZE]},
    {"prompt": [2**31]},
    {"prompt": [2**63]},
    {"prompt": [10**40]},
    {"prompt": ["a"] * 1025},
    {"logprobs": -1},
    {"logprobs": 21},
    {"logprobs": True},
    {"echo": "yes"},
    {"best_of": 0},
    {"best_of": 129},
    {"best_of": 2, "n": 3},
    {"best_of": 2, "stream": True},
    {"suffix": "x"},
    {"suffix": 5},
    {"add_special_tokens": 1},
    {"prompt": "", "add_special_tokens": False},
    {"continue_final_message": True},
    {"n": 128, "prompt": ["a"] * 9},
]
BAD_FORMS: list[dict[str, Any]] = [
    {"response_format": "text"},
    {"response_format": {}},
    {"response_format": {"type": "grammar"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": False}}},
    {"response_format": {"type": "json_object", "schema": {"uniqueItems": True}}},
    {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
    {"response_format": {"type": "text", "schema": {}}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"regex": "(?<=x)a"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    {"structured_outputs": {"structural_tag": "{}"}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"json": '{"type": "foo"}'}},
    {"structured_outputs": {"json": "[1]"}},
    {"guided_json": {"$ref": "https://example.com/schema.json"}},
    {"guided_json": {"type": "string", "format": "unheard-of"}},
    {"guided_regex": 5},
    {"guided_choice": []},
    {"guided_choice": [5]},
    {"guided_grammar": "start: <unheard-of>"},
    {"guided_whitespace_pattern": "x"},
    {"response_format": {"type": "json_object"}, "guided_regex": "a"},
    {"bad_words": [""]},
    {"bad_words": "x"},
    {"bad_words": ["x"] * 129},
    {"bad_words": ["x" * 1001]},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [-1]},
    {"allowed_token_ids": [VOCAB_SIZE]},
    {"allowed_token_ids": [True]},
    {"allowed_token_ids": [5] * 16_385},
]
CHANGES_MEANING = [
    {"tool_choice": "auto"},
    {"functions": [{"name": "f"}]},
    {"modalities": ["text", "audio"]},
    {"audio": {"voice": "x"}},
    {"prompt_embeds": "AAAA"},
    {"chat_template": "{{ x }}"},
    {"chat_template_kwargs": {"tokenize": True}},
    {"lora_path": "../.."},
    {"use_beam_search": True},
]
CHANGES_NOTHING = {
    "tools": None,
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "suffix": None,
    "modalities": ["text"],
    "chat_template_kwargs": {},
    "user": None,
}


@pytest.mark.covers("R22")
def test_sequences_are_counted_before_any_is_made(server: LiveServer) -> None:
    response = server.complete(["a"] * 9, n=128, logit_bias={str(VOCAB_SIZE): 1})
    assert_error(response, 400, param="n")


def check_refused(server: LiveServer, path: str, body: dict[str, Any], fields: dict[str, Any]) -> None:
    for asked in ({**body, **fields}, {**body, "stream": True, **fields}):
        response = server.http.post(path, json=asked)
        message = assert_error(response, 400)
        param = response.json()["error"]["param"]
        name = param.partition("[")[0].partition(".")[0]
        assert name in fields
        assert name in message
        assert len(message) < 500
    assert server.engine.submitted == []


@pytest.mark.covers("R11", "R12", "R20", "R21", "R22", "R23", "R24", "R25", "R26", "R27", "R31", "R35")
@pytest.mark.parametrize(
    "fields", BAD_COMMON_FIELDS + BAD_CHAT_FIELDS + BAD_FORMS + CHANGES_MEANING, ids=lambda f: str(f)[:50]
)
def test_a_chat_with_a_bad_field_is_refused_by_name(server: LiveServer, fields: dict[str, Any]) -> None:
    check_refused(server, "/v1/chat/completions", {"messages": USER}, fields)


@pytest.mark.covers("R15", "R16", "R20", "R21", "R22", "R23", "R24", "R25", "R26", "R27", "R31", "R35")
@pytest.mark.parametrize(
    "fields", BAD_COMMON_FIELDS + BAD_COMPLETION_FIELDS + BAD_FORMS + CHANGES_MEANING, ids=lambda f: str(f)[:50]
)
def test_a_completion_with_a_bad_field_is_refused_by_name(server: LiveServer, fields: dict[str, Any]) -> None:
    check_refused(server, "/v1/completions", {"prompt": "hi"}, fields)


def test_stream_options_need_a_stream(server: LiveServer) -> None:
    fields = {"stream_options": {"include_usage": True}}
    assert_error(server.chat(**fields), 400, param="stream_options")
    assert_error(server.complete(stream=False, **fields), 400, param="stream_options")


def test_a_message_names_limit_and_value(server: LiveServer) -> None:
    assert assert_error(server.chat(temperature=2.5), 400, param="temperature") == (
        "'temperature' must be at most 2.0, got 2.5."
    )
    message = assert_error(server.chat(logit_bias={"99999": 1}), 400, param="logit_bias")
    assert "99999" in message
    assert str(VOCAB_SIZE - 1) in message


@pytest.mark.covers("R01")
def test_a_missing_field_is_named(server: LiveServer) -> None:
    response = server.http.post("/v1/chat/completions", json={})
    assert_error(response, 400, param="messages", code="missing_required_parameter")


def test_values_that_ask_for_nothing_are_taken_and_not_reported(server: LiveServer) -> None:
    for response in (server.chat(**CHANGES_NOTHING), server.complete(**CHANGES_NOTHING)):
        assert response.status_code == 200
        assert "x-ignored-fields" not in response.headers


@pytest.mark.covers("R32")
def test_fields_without_effect_are_named_in_a_header(server: LiveServer) -> None:
    fields = {"user": "someone", "store": True, "metadata": {}, "frobnicate": 1, "service_tier": "flex"}
    named = "frobnicate, metadata, service_tier, store, user"
    assert server.chat(**fields).headers["x-ignored-fields"] == named
    assert server.chat(stream=True, **fields).headers["x-ignored-fields"] == named
    assert server.complete(**fields).headers["x-ignored-fields"] == named


def test_fields_of_objects_within_are_named_with_their_place(server: LiveServer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}], "name": "bob"},
        {"role": "assistant", "content": "b", "refusal": None, "name": "eve"},
    ]
    response = server.http.post(
        "/v1/chat/completions",
        json={"messages": messages, "stream": True, "stream_options": {"include_obfuscation": True}},
    )
    assert response.headers["x-ignored-fields"] == (
        "messages[].content[].cache_control, messages[].name, stream_options.include_obfuscation"
    )


def test_a_field_s_name_cannot_break_the_header(server: LiveServer) -> None:
    response = server.chat(**{"a\r\nset-cookie: x": 1, "é" * 5000: 1, **{f"f{i}": 1 for i in range(1000)}})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    assert len(response.headers["x-ignored-fields"]) < 20_000


@pytest.mark.covers("R32")
def test_strict_mode_refuses_whatever_would_be_ignored() -> None:
    with live_server(strict=True) as server:
        for ask in (server.chat, server.complete):
            assert_error(ask(frobnicate=1), 400, param="frobnicate", code="unknown_parameter")
            assert_error(ask(stream=True, frobnicate=1), 400, param="frobnicate")
            for field in sorted(ignored_fields._INERT):
                assert_error(ask(**{field: "x"}), 400, param=field, code="unsupported_parameter")
                assert ask(**{field: None}).status_code == 200
            response = ask(temperature=0.5, stop="x", priority=1)
            assert response.status_code == 200
            assert "x-ignored-fields" not in response.headers


@pytest.mark.covers("R18", "R19")
@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "status"),
    [
        (MAX_SEQUENCE_TOKENS - 1, None, 200),
        (MAX_SEQUENCE_TOKENS - 1, 1, 200),
        (MAX_SEQUENCE_TOKENS - 1, 2, 400),
        (MAX_SEQUENCE_TOKENS, None, 400),
        (MAX_MODEL_LEN - 1, None, 400),
        (MAX_MODEL_LEN, None, 400),
        (MAX_MODEL_LEN + 1, None, 400),
        (10, MAX_SEQUENCE_TOKENS - 10, 200),
        (10, MAX_SEQUENCE_TOKENS - 9, 400),
        (10, MAX_MODEL_LEN - 9, 400),
    ],
)
def test_what_cannot_fit_is_refused_before_the_engine(
    server: LiveServer, num_prompt: int, max_tokens: int | None, status: int
) -> None:
    response = server.complete([BOS] * num_prompt, max_tokens=max_tokens)
    assert response.status_code == status
    if status == 400:
        message = assert_error(response, 400, code="context_length_exceeded")
        assert str(num_prompt) in message
        assert str(MAX_MODEL_LEN) in message or str(MAX_SEQUENCE_TOKENS) in message
        assert server.engine.submitted == []


@pytest.mark.covers("R18", "R19")
def test_the_refusal_says_whether_model_or_memory_is_the_limit(server: LiveServer) -> None:
    over_model = assert_error(server.complete([BOS] * MAX_MODEL_LEN), 400, param="prompt")
    over_pool = assert_error(server.complete([BOS] * MAX_SEQUENCE_TOKENS), 400, param="prompt")
    assert "context length" in over_model
    assert "KV" in over_pool


def test_a_chat_that_cannot_fit_names_both_numbers(server: LiveServer) -> None:
    message = assert_error(server.chat("a", max_tokens=60), 400, code="context_length_exceeded")
    assert "60" in message
    assert str(MAX_MODEL_LEN) in message


def test_a_text_is_refused_by_its_length_before_it_is_tokenized(server: LiveServer) -> None:
    text = "a" * 5_000_000
    for response in (server.chat(text), server.complete(text), server.complete(["b", text])):
        assert "characters" in assert_error(response, 400, code="context_length_exceeded")


def test_a_long_text_is_tokenized_off_the_event_loop_with_the_same_result(server: LiveServer) -> None:
    response = server.http.post("/tokenize", json={"prompt": "\n" * 2000})
    assert response.json()["count"] == 1 + len(TOKENIZER.encode_text("\n" * 2000))
    with live_server() as big:
        assert big.runtime.model is not None
        ids = big.http.post("/tokenize", json={"prompt": "ab " * 600}).json()["tokens"]
        assert ids == [BOS, *TOKENIZER.encode_text("ab " * 600)]


@pytest.mark.covers("R17")
@pytest.mark.parametrize("token", sorted(TOKENIZER.control_token_ids))
def test_every_control_token_may_be_typed(server: LiveServer, token: int) -> None:
    text = TOKENIZER.token_text(token)
    assert server.chat(text).status_code == 200
    assert server.complete(text).status_code == 200
    assert server.complete([token]).status_code == 200
    assert server.chat(stop=text).status_code == 200


@pytest.mark.covers("R06")
@pytest.mark.parametrize("text", ["\0", "\u2028", "\u202eabc", "a\u0301" * 8, "\ufeff", "👨‍👩‍👧"])
def test_unusual_text_comes_back_as_it_went(server: LiveServer, text: str) -> None:
    assert server.complete(text, echo=True, max_tokens=1).json()["choices"][0]["text"].startswith(text)
    ids = server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


@pytest.mark.covers("R11", "S05")
@pytest.mark.parametrize("name", ["nope", "", "x" * 1_000_000, "../../etc/passwd", "gemmä"])
def test_an_unknown_model_is_a_404(server: LiveServer, name: str) -> None:
    for response in (
        server.chat(model=name),
        server.complete(model=name),
        server.chat(model=name, stream=True),
        server.http.post("/tokenize", json={"model": name, "prompt": "a"}),
    ):
        assert len(assert_error(response, 404, param="model", code="model_not_found")) < 500
    assert EOS not in server.engine.submitted
