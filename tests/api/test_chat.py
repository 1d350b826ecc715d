from __future__ import annotations

import json

import pytest

from server.chat_template import ChatMessage, render_chat
from server.frontend.client import CrashingSequenceError, SequenceLostError
from tests.api.support import (
    ALIAS,
    END_OF_TURN,
    EOS,
    MAX_MODEL_LEN,
    MAX_SEQUENCE_TOKENS,
    MODEL,
    TOKENIZER,
    LiveServer,
    assert_error,
    chunks,
)


def test_a_conversation_is_answered_in_openai_s_shape(server: LiveServer) -> None:
    server.script.cached_tokens = 3
    response = server.chat("ab", model=MODEL)
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert isinstance(body["created"], int)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab user 日 model", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt = render_chat([ChatMessage("user", "ab")], TOKENIZER).token_ids(TOKENIZER)
    assert server.engine.submitted[0].prompt_token_ids == prompt
    output = len(TOKENIZER.encode_text("ab user 日 model")) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": output,
        "total_tokens": len(prompt) + output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_parameters_reach_the_engine(server: LiveServer) -> None:
    response = server.chat(
        model=ALIAS,
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        seed=-1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"9": -100, "10": 2.5},
        stop_token_ids=[20],
        min_tokens=2,
        max_tokens=9,
        logprobs=True,
        top_logprobs=2,
    )
    assert response.status_code == 200
    params = server.engine.submitted[0].params
    assert params.temperature == 0.25
    assert params.top_p == 0.5
    assert params.top_k == 7
    assert params.min_p == 0.125
    assert params.seed == 2**64 - 1
    assert params.presence_penalty == -2
    assert params.frequency_penalty == 2
    assert params.repetition_penalty == 1.5
    assert params.logit_bias == {9: -100.0, 10: 2.5}
    assert params.stop_token_ids == (EOS, END_OF_TURN, 20)
    assert params.min_tokens == 2
    assert params.max_tokens == 9
    assert params.logprobs == 2
    assert params.prompt_logprobs is None


def test_defaults_are_openai_s_and_null_means_default(server: LiveServer) -> None:
    names = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "n",
        "logit_bias",
        "max_tokens",
        "logprobs",
    ]
    for fields in ({}, dict.fromkeys([*names, "stream", "presence_penalty", "stream_options", "ignore_eos"])):
        assert server.chat(**fields).status_code == 200
    for request in server.engine.submitted:
        params = request.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
        room = min(MAX_MODEL_LEN, MAX_SEQUENCE_TOKENS) - len(request.prompt_token_ids)
        assert params.max_tokens == room
        assert params.logit_bias == {}
        assert params.logprobs is None
    first, second = (request.params.seed for request in server.engine.submitted)
    assert first != second


def test_top_k_minus_one_is_taken_for_off(server: LiveServer) -> None:
    assert server.chat(top_k=-1).status_code == 200
    assert server.engine.submitted[0].params.top_k == 0


@pytest.mark.covers("R20")
def test_max_completion_tokens_wins_over_max_tokens(server: LiveServer) -> None:
    body = server.chat(max_tokens=9, max_completion_tokens=2).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_choices_have_seeds_that_count_up(server: LiveServer) -> None:
    body = server.chat(n=3, seed=2**63 - 1, temperature=0).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(request.params.seed for request in server.engine.submitted) == [2**63 - 1, 2**63, 2**63 + 1]
    assert body["usage"]["prompt_tokens"] == len(server.engine.submitted[0].prompt_token_ids)
    assert body["usage"]["completion_tokens"] == 3 * (len(TOKENIZER.encode_text(server.script.text)) + 1)


def test_a_stop_string_ends_the_text_and_the_sequence(server: LiveServer) -> None:
    server.script.ends_with_stop = False
    body = server.chat(stop=["日 m", "nothing"]).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] == "ab user "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "日 m"
    assert server.engine.aborted == [server.engine.submitted[0].request_id]


def test_ignore_eos_leaves_only_the_request_s_own_stops(server: LiveServer) -> None:
    body = server.chat(ignore_eos=True, max_tokens=20, stop_token_ids=[6]).json()
    assert server.engine.submitted[0].params.stop_token_ids == (6,)
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_stop_token_of_the_request_is_named(server: LiveServer) -> None:
    (token_id,) = TOKENIZER.encode_text("日")
    body = server.chat(stop_token_ids=[token_id]).json()
    assert body["choices"][0]["message"]["content"] == "ab user "
    assert body["choices"][0]["stop_reason"] == token_id


def test_logprobs_come_with_text_bytes_and_alternatives(server: LiveServer) -> None:
    server.script.text = "日é"
    body = server.chat(logprobs=True, top_logprobs=2, max_tokens=1).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "日",
                "logprob": -0.5,
                "bytes": [0xE6, 0x97, 0xA5],
                "top_logprobs": [
                    {"token": "日", "logprob": -0.5, "bytes": [0xE6, 0x97, 0xA5]},
                    {"token": "<eos>", "logprob": -9999.0, "bytes": list(b"<eos>")},
                ],
            }
        ],
        "refusal": None,
    }


def test_text_parts_are_text(server: LiveServer) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "user"}]
    response = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    assert response.status_code == 200
    expected = render_chat([ChatMessage("user", "abuser")], TOKENIZER).token_ids(TOKENIZER)
    assert server.engine.submitted[0].prompt_token_ids == expected


@pytest.mark.parametrize("first_role", ["system", "developer", "user", "assistant"])
def test_every_role_may_come_first_and_repeat(server: LiveServer, first_role: str) -> None:
    messages = [{"role": first_role, "content": "a"}, {"role": first_role, "content": "b"}]
    assert server.http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200


def test_control_tokens_typed_in_a_message_are_text(server: LiveServer) -> None:
    server.chat("<eos>")
    assert EOS not in server.engine.submitted[0].prompt_token_ids


@pytest.mark.covers("H10")
def test_a_stream_says_what_the_whole_answer_says(server: LiveServer) -> None:
    whole = server.chat(n=2).json()
    stream = chunks(server.chat(n=2, stream=True))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in stream}) == 1
    assert stream[0]["object"] == "chat.completion.chunk"
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in stream if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in mine[1:])
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == ["stop"]
        assert mine[-1]["finish_reason"] == "stop"
        assert all(part["delta"] for part in mine[:-1])
    assert all("usage" not in chunk for chunk in stream)


@pytest.mark.covers("H10")
def test_a_stream_ends_with_usage_where_asked_for(server: LiveServer) -> None:
    whole = server.chat().json()
    stream = chunks(server.chat(stream=True, stream_options={"include_usage": True}))
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in stream[:-1])


def test_continuous_usage_grows_with_the_stream(server: LiveServer) -> None:
    stream = chunks(server.chat(stream=True, stream_options={"continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream]
    assert counts == sorted(counts)
    assert counts[-1] == len(TOKENIZER.encode_text(server.script.text)) + 1


def test_a_stream_s_logprobs_are_the_whole_answer_s(server: LiveServer) -> None:
    whole = server.chat(logprobs=True, top_logprobs=1).json()
    stream = chunks(server.chat(logprobs=True, top_logprobs=1, stream=True))
    parts = [c["choices"][0]["logprobs"] for c in stream if c["choices"][0]["logprobs"]]
    tokens = [token for part in parts for token in part["content"]]
    assert tokens == whole["choices"][0]["logprobs"]["content"]


def test_a_character_of_several_tokens_is_streamed_whole(server: LiveServer) -> None:
    server.script.text = "a😀b"
    stream = chunks(server.chat(stream=True))
    texts = [c["choices"][0]["delta"].get("content", "") for c in stream]
    assert "".join(texts) == "a😀b"
    assert all("\ufffd" not in text for text in texts)


def test_separators_and_controls_in_text_do_not_break_events(server: LiveServer) -> None:
    server.script.text = "a\u2028b\r\nc\u0000\u0085"
    stream = chunks(server.chat(stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in stream) == server.script.text
    assert server.chat().json()["choices"][0]["message"]["content"] == server.script.text


def test_tokens_without_text_are_no_events(server: LiveServer) -> None:
    server.script.text = "ab"
    stream = chunks(server.chat(stream=True, ignore_eos=True, max_tokens=12))
    assert all(chunk["choices"][0]["delta"] for chunk in stream[:-1])
    assert "ab" in "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream)


def test_outputs_that_were_merged_are_one_event(server: LiveServer) -> None:
    server.script.text, server.script.tokens_per_output = "abcdefgh", 4
    stream = chunks(server.chat(stream=True))
    assert len(stream) < len(TOKENIZER.encode_text("abcdefgh"))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in stream) == "abcdefgh"


def test_a_failing_sequence_is_a_500_and_says_nothing_of_the_inside(server: LiveServer) -> None:
    server.script.error_after = 2
    assert_error(server.chat(), 500, code="generation_failed")
    assert_error(server.chat(n=3), 500, code="generation_failed")


@pytest.mark.covers("H10", "H11")
def test_a_failing_sequence_ends_a_stream_with_an_error_event(server: LiveServer) -> None:
    server.script.error_after = 2
    stream = chunks(server.chat(stream=True))
    assert stream[0]["choices"][0]["delta"]["role"] == "assistant"
    assert stream[-1]["error"]["code"] == "generation_failed"
    assert "secret" not in json.dumps(stream)


def test_an_unforeseen_fault_is_a_500_with_the_request_s_id(server: LiveServer) -> None:
    server.script.crash_after = 1
    response = server.chat()
    message = assert_error(response, 500, code="internal_error")
    assert response.headers["x-request-id"] in message
    stream = chunks(server.chat(stream=True))
    assert stream[-1]["error"]["code"] == "internal_error"


@pytest.mark.covers("E01")
def test_a_request_that_is_lost_with_its_engine_is_to_be_sent_again(server: LiveServer) -> None:
    server.script.death_after, server.script.death = 1, SequenceLostError
    response = server.chat()
    assert_error(response, 503, code="engine_lost")
    assert int(response.headers["retry-after"]) > 0
    *_, last_delta, error = chunks(server.chat(stream=True))
    assert last_delta["choices"][0]["delta"]["content"]
    assert error["error"]["code"] == "engine_lost"


def test_a_request_that_crashes_the_engine_is_not_to_be_sent_again(server: LiveServer) -> None:
    server.script.death_after, server.script.death = 0, CrashingSequenceError
    response = server.chat()
    assert_error(response, 500, code="engine_crashed")
    assert response.headers["x-should-retry"] == "false"
    assert chunks(server.chat(stream=True))[-1]["error"]["code"] == "engine_crashed"


def test_a_dying_engine_ends_every_request_of_its(server: LiveServer) -> None:
    server.script.death_after = 1
    response = server.chat()
    assert_error(response, 503, code="engine_unavailable")
    assert int(response.headers["retry-after"]) > 0
    stream = chunks(server.chat(stream=True, n=2))
    assert stream[-1]["error"]["code"] == "engine_unavailable"
