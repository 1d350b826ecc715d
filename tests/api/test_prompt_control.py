"""How a request shapes its prompt: where a chat goes on, what is cut off, what a middle lies between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tokenizers

from server.chat_template import ChatMessage, render_chat
from server.gguf_tokenizer import PieceType, build_tokenizer_json
from server.tokenizer import Tokenizer
from tests.api.support import (
    END_OF_TURN,
    EOS,
    MAX_SEQUENCE_TOKENS,
    TOKENIZER,
    LiveServer,
    Script,
    assert_error,
    chunks,
    live_server,
)
from tests.fixtures_tokenizers import tiny_vocabulary

BOS = TOKENIZER.bos_id
CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": " us "}]


def chat(server: LiveServer, messages: list[dict[str, str]], **fields: Any) -> Any:
    return server.http.post("/v1/chat/completions", json={"messages": messages, **fields})


def prompts(server: LiveServer) -> list[list[int]]:
    return [request.prompt_token_ids for request in server.engine.submitted]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode_controls(text)


def test_the_last_message_s_turn_is_left_open_to_be_continued(server: LiveServer) -> None:
    assert chat(server, CHAT, continue_final_message=True).status_code == 200
    assert chat(server, CHAT, continue_final_message=True, add_generation_prompt=False).status_code == 200
    begun = "<bos><start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\nus"
    assert prompts(server) == [ids_of(begun)] * 2


def test_without_a_generation_prompt_the_conversation_ends_with_its_last_turn(server: LiveServer) -> None:
    chat(server, CHAT, add_generation_prompt=False)
    chat(server, CHAT, add_generation_prompt=True)
    whole = "<bos><start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\nus<end_of_turn>\n"
    assert prompts(server) == [ids_of(whole), ids_of(whole + "<start_of_turn>model\n")]


def test_a_last_message_cannot_both_go_on_and_be_followed(server: LiveServer) -> None:
    response = chat(server, CHAT, continue_final_message=True, add_generation_prompt=True)
    assert "both" in assert_error(response, 400, param="continue_final_message")


@pytest.mark.parametrize("role", ["user", "system"])
def test_only_the_assistant_s_last_message_can_be_continued(server: LiveServer, role: str) -> None:
    response = chat(server, [*CHAT, {"role": role, "content": "x"}], continue_final_message=True)
    assert role in assert_error(response, 400, param="continue_final_message")


def test_tokenize_shows_a_continued_message(server: LiveServer) -> None:
    body = {"messages": CHAT, "continue_final_message": True}
    tokens = server.http.post("/tokenize", json=body).json()["tokens"]
    assert tokens == ids_of("<bos><start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\nus")


@pytest.mark.parametrize("continues", [True, False])
def test_echo_puts_the_assistant_s_last_message_before_the_output(server: LiveServer, continues: bool) -> None:
    fields = {"echo": True, "continue_final_message": continues, "n": 2}
    whole = chat(server, CHAT, **fields).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["us" + server.script.text] * 2
    streamed = chunks(chat(server, CHAT, stream=True, **fields))
    for index in range(2):
        deltas = [part["choices"][0]["delta"] for part in streamed if part["choices"][0]["index"] == index]
        assert "".join(delta.get("content", "") for delta in deltas) == "us" + server.script.text
    assert chat(server, CHAT[:1], echo=True).json()["choices"][0]["message"]["content"] == server.script.text


def test_raw_prompts_begin_with_bos_unless_that_is_not_wanted(server: LiveServer) -> None:
    server.complete("ab", add_special_tokens=False)
    server.complete(["<bos>ab", "a"], add_special_tokens=False)
    server.complete("ab", add_special_tokens=True)
    assert prompts(server) == [ids_of("ab"), ids_of("<bos>ab"), ids_of("a"), ids_of("<bos>ab")]
    message = assert_error(server.complete(["ab", ""], add_special_tokens=False), 400, param="prompt")
    assert "no tokens" in message


def test_the_offsets_of_an_echo_without_bos_begin_with_the_text(server: LiveServer) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 0, "add_special_tokens": False}
    logprobs = server.complete("日us", **fields).json()["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["日", "us"], [0, 1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 3}, "<bos>yz"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "<bos>yz"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "<bos>vw"),
        ({"truncate_prompt_tokens": 1}, "<bos>"),
        ({"truncate_prompt_tokens": 6}, "<bos>vwxyz"),
        ({"truncate_prompt_tokens": 2**62}, "<bos>vwxyz"),
        ({"truncate_prompt_tokens": -1}, "<bos>vwxyz"),
        ({"truncate_prompt_tokens": 2, "add_special_tokens": False}, "yz"),
        ({"truncate_prompt_tokens": 2, "add_special_tokens": False, "truncation_side": "right"}, "vw"),
        ({"truncation_side": "left"}, "<bos>vwxyz"),
    ],
)
def test_a_long_prompt_loses_what_comes_behind_its_bos(
    server: LiveServer, fields: dict[str, Any], expected: str
) -> None:
    assert server.complete("vwxyz", **fields).status_code == 200
    assert prompts(server) == [ids_of(expected)]


def test_prompts_of_ids_are_cut_as_texts_are(server: LiveServer) -> None:
    server.complete([[7, 9, 11], [BOS, 9, 11]], truncate_prompt_tokens=2)
    assert prompts(server) == [[9, 11], [BOS, 11]]


def test_an_echo_shows_what_was_left_of_the_prompt(server: LiveServer) -> None:
    fields: dict[str, Any] = {"truncate_prompt_tokens": 3, "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = server.complete("vwxyz", **fields).json()["choices"][0]
    assert choice["text"] == "<bos>yz"
    assert choice["logprobs"]["tokens"] == ["<bos>", "y", "z"]
    assert choice["logprobs"]["text_offset"] == [0, 5, 6]


def test_minus_one_cuts_to_what_leaves_room_for_the_output(server: LiveServer) -> None:
    ids = [BOS, *range(8, 8 + 100)]
    server.complete(ids, truncate_prompt_tokens=-1, max_tokens=20)
    server.complete(ids, truncate_prompt_tokens=-1)
    server.complete(ids, truncate_prompt_tokens=-1, max_tokens=0, echo=True)
    room = MAX_SEQUENCE_TOKENS
    lengths = [room - 20, room - 16, room - 1]
    assert prompts(server) == [[BOS, *ids[len(ids) - length + 1 :]] for length in lengths]
    response = server.complete(ids, truncate_prompt_tokens=-1, max_tokens=room)
    assert_error(response, 400, param="max_tokens", code="context_length_exceeded")


def test_a_chat_is_cut_to_what_fits(server: LiveServer) -> None:
    long = "a" * 30 + "b" * 70
    assert_error(server.chat(long), 400, code="context_length_exceeded")
    assert server.chat(long, truncate_prompt_tokens=-1, max_tokens=9).status_code == 200
    whole = render_chat([ChatMessage("user", long)], TOKENIZER).token_ids(TOKENIZER)
    length = MAX_SEQUENCE_TOKENS - 9
    assert prompts(server) == [[BOS, *whole[len(whole) - length + 1 :]]]
    assert server.chat(long, truncate_prompt_tokens=12, max_completion_tokens=5).status_code == 200
    assert prompts(server)[1] == [BOS, *whole[-11:]]


# --- filling in a middle -----------------------------------------------------------------------------------

FIM_PIECES = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>"]


def make_fim_tokenizer() -> Tokenizer:
    """The tiny one with CodeGemma's pieces, which its file does not flag as special."""
    pieces, types, scores = tiny_vocabulary()
    count = len(FIM_PIECES)
    data = build_tokenizer_json(
        pieces + FIM_PIECES, types + [PieceType.USER_DEFINED] * count, scores + [0.0] * count
    )
    return Tokenizer(tokenizers.Tokenizer.from_buffer(data))


FIM = make_fim_tokenizer()
PREFIX, SUFFIX, MIDDLE, SEPARATOR = (FIM.fim_ids[piece] for piece in FIM_PIECES)


@pytest.fixture(scope="module")
def _code_server() -> Iterator[LiveServer]:
    with live_server() as server:
        model = server.runtime.model
        assert model is not None
        info = type(model.info)(
            **{name: getattr(model.info, name) for name in model.info.__struct_fields__}
            | {"vocab_size": FIM.vocab_size}
        )
        server.runtime.model = replace(model, tokenizer=FIM, info=info)
        yield server


@pytest.fixture
def code_server(_code_server: LiveServer) -> LiveServer:
    _code_server.engine.script = Script()
    _code_server.engine.submitted.clear()
    return _code_server


def test_a_middle_is_asked_for_between_prompt_and_suffix(code_server: LiveServer) -> None:
    body = code_server.complete(["ab", "us"], suffix="del", max_tokens=2).json()
    assert prompts(code_server) == [
        [BOS, PREFIX, *ids_of(prefix), SUFFIX, *ids_of("del"), MIDDLE] for prefix in ("ab", "us")
    ]
    text = TOKENIZER.decode(TOKENIZER.encode_text(code_server.script.text)[:2])
    assert [choice["text"] for choice in body["choices"]] == [text, text]


def test_a_middle_ends_where_another_would_begin(code_server: LiveServer) -> None:
    code_server.complete("ab", suffix="us")
    code_server.complete("ab")
    filled, plain = (set(request.params.stop_token_ids) for request in code_server.engine.submitted)
    assert filled == {EOS, END_OF_TURN, PREFIX, SUFFIX, MIDDLE, SEPARATOR}
    assert plain == {EOS, END_OF_TURN}
    code_server.script.token_ids = [*ids_of("ab"), SEPARATOR]
    (choice,) = code_server.complete("ab", suffix="us").json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", None)


@pytest.mark.covers("S13")
def test_control_tokens_in_prompt_and_suffix_are_text(code_server: LiveServer) -> None:
    code_server.complete("<|fim_middle|>", suffix="<bos><|file_separator|>", max_tokens=1)
    (ids,) = prompts(code_server)
    controls = [token_id for token_id in ids if token_id in FIM.control_token_ids]
    assert controls == [BOS, PREFIX, SUFFIX, MIDDLE]
    assert FIM.decode(ids) == "<|fim_middle|><bos><|file_separator|>"


def test_a_prompt_in_ids_may_bring_control_tokens_and_its_bos(code_server: LiveServer) -> None:
    code_server.complete([BOS, SEPARATOR, 9], suffix="us", max_tokens=1)
    assert prompts(code_server) == [[BOS, PREFIX, SEPARATOR, 9, SUFFIX, *ids_of("us"), MIDDLE]]


def test_an_empty_suffix_asks_for_nothing(server: LiveServer) -> None:
    server.complete("ab", suffix="")
    assert prompts(server) == [ids_of("<bos>ab")]


def test_a_typed_infilling_prompt_is_taken_as_it_is(code_server: LiveServer) -> None:
    code_server.complete("<|fim_prefix|>ab<|fim_suffix|>us<|fim_middle|>", max_tokens=1)
    assert prompts(code_server) == [[BOS, PREFIX, *ids_of("ab"), SUFFIX, *ids_of("us"), MIDDLE]]


@pytest.mark.covers("R35")
def test_a_model_without_the_tokens_refuses_a_suffix(server: LiveServer) -> None:
    message = assert_error(server.complete("a", suffix="b"), 400, param="suffix", code="unsupported_parameter")
    assert "CodeGemma" in message


@pytest.mark.parametrize("other", [{"echo": True}, {"truncate_prompt_tokens": 9}])
def test_what_would_break_the_form_cannot_be_combined_with_a_suffix(
    code_server: LiveServer, other: dict[str, Any]
) -> None:
    message = assert_error(code_server.complete("a", suffix="b", **other), 400, param="suffix")
    assert next(iter(other)) in message


def test_prompt_and_suffix_are_bounded_together(code_server: LiveServer) -> None:
    response = code_server.complete("a" * 30, suffix="b" * 30)
    assert_error(response, 400, code="context_length_exceeded")
    assert_error(code_server.complete("a", suffix="b" * 5_000_000), 400, param="suffix")
