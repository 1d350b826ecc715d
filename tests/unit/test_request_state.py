from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.types import FinishReason, SequenceOutput, TokenLogprob
from server.frontend.request_state import RequestState, StopConditions, TextDelta
from server.tokenizer import Tokenizer
from tests.fixtures_tokenizers import make_tiny_tokenizer

TINY = make_tiny_tokenizer()
EOS = TINY.eos_id


def piece(text: str) -> int:
    """The id of the one token that `text` is."""
    (token_id,) = TINY.encode_text(text)
    return token_id


def byte_ids(text: str) -> list[int]:
    return [8 + byte for byte in text.encode()]


def output(token_ids: list[int], finish_reason: FinishReason | None = None, **fields: Any) -> SequenceOutput:
    return SequenceOutput(request_id="r", token_ids=token_ids, finish_reason=finish_reason, **fields)


def run(state: RequestState, outputs: list[SequenceOutput]) -> list[TextDelta]:
    return [delta for delta in map(state.update, outputs) if delta is not None]


def state_with(*strings: str, **fields: Any) -> RequestState:
    return RequestState(TINY, StopConditions(strings=strings, **fields))


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_without_stops_each_token_is_told_at_once() -> None:
    state = state_with()
    deltas = run(
        state, [output([piece("a")]), output([piece("b"), piece("c")]), output([], FinishReason.LENGTH)]
    )
    assert [(delta.text, delta.token_ids) for delta in deltas] == [
        ("a", [piece("a")]),
        ("bc", [piece("b"), piece("c")]),
        ("", []),
    ]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]
    assert deltas[-1].stop_reason is None
    assert state.num_generated == 3


def test_an_output_that_completes_no_character_tells_nothing() -> None:
    state = state_with()
    first, second = byte_ids("é")
    assert state.update(output([first])) is None
    delta = state.update(output([second]))
    assert delta is not None
    assert (delta.text, delta.token_ids) == ("é", [first, second])


@pytest.mark.parametrize(
    "reason", [FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR, FinishReason.STOP]
)
def test_held_text_is_released_when_the_sequence_ends_otherwise(reason: FinishReason) -> None:
    state = state_with("bcd")
    deltas = run(state, [output([piece("a")]), output([piece("b")]), output([piece("c")], reason)])
    assert [delta.text for delta in deltas] == ["a", "bc"]
    assert deltas[-1].finish_reason is reason
    assert deltas[-1].token_ids == [piece("b"), piece("c")]


def test_a_stop_string_cuts_the_text_before_it_and_is_reported() -> None:
    state = state_with("bc")
    deltas = run(state, [output([piece("a")]), output([piece("b")]), output([piece("c"), piece("d")])])
    assert text_of(deltas) == "a"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "bc")
    assert state.is_finished
    assert state.num_generated == 3  # d was not looked at


def test_a_stop_string_can_be_kept() -> None:
    state = state_with("bc", include_in_output=True)
    deltas = run(state, [output([piece("a"), piece("b")]), output([piece("c"), piece("d")])])
    assert text_of(deltas) == "abc"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [piece(x) for x in "abc"]


def test_only_a_live_beginning_of_a_stop_string_is_held() -> None:
    state = state_with("abx")
    deltas = run(state, [output([piece(x)]) for x in "ababc"])
    assert [delta.text for delta in deltas] == ["ab", "abc"]


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [("aab", "aaab", "a"), ("abac", "ababac", "ab"), ("aabaaa", "aabaabaaac", "aab")],
)
def test_a_stop_string_is_found_within_a_failed_beginning_of_itself(
    stop: str, text: str, expected: str
) -> None:
    assert text_of(run(state_with(stop), [output([piece(x)]) for x in text])) == expected


def test_what_comes_after_the_end_is_ignored() -> None:
    state = state_with("b")
    run(state, [output([piece("b")])])
    assert state.update(output([piece("c")])) is None
    assert state.update(output([], FinishReason.ABORT)) is None


def test_a_stop_token_has_no_text_and_is_counted() -> None:
    state, stop = state_with(), piece("b")
    deltas = run(state, [output([piece("a"), stop], FinishReason.STOP, stop_token_id=stop)])
    assert (text_of(deltas), deltas[-1].token_ids) == ("a", [piece("a")])
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, stop)
    assert state.num_generated == 2


def test_a_stop_token_of_the_model_is_not_reported_as_a_reason() -> None:
    state = state_with(silent_token_ids=frozenset({EOS}))
    (delta,) = run(state, [output([EOS], FinishReason.STOP, stop_token_id=EOS)])
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, None)


def test_a_stop_tokens_text_can_be_kept() -> None:
    state = state_with(include_in_output=True)
    (delta,) = run(state, [output([piece("a"), piece("b")], FinishReason.STOP, stop_token_id=piece("b"))])
    assert (delta.text, delta.token_ids) == ("ab", [piece("a"), piece("b")])


def test_a_stop_string_wins_over_the_engines_reason_in_the_same_output() -> None:
    state = state_with("b")
    (delta,) = run(state, [output([piece("a"), piece("b")], FinishReason.LENGTH)])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")


def test_the_match_that_is_complete_first_wins_and_then_the_longest() -> None:
    for strings, expected in (
        (("abcd", "bc"), ("a", "bc")),
        (("c", "bc"), ("a", "bc")),
        (("bc", "c"), ("a", "bc")),
    ):
        state = state_with(*strings)
        deltas = run(state, [output([piece(x) for x in "abcd"])])
        assert (text_of(deltas), deltas[-1].stop_reason) == expected


def test_stop_strings_are_not_honoured_within_min_tokens() -> None:
    state = state_with("b", min_tokens=2)
    deltas = run(state, [output([piece(x)]) for x in "abab"])
    assert (text_of(deltas), state.num_generated) == ("aba", 4)
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_a_stop_string_that_begins_within_min_tokens_and_ends_after_them_counts() -> None:
    state = state_with("bc", min_tokens=2)
    assert text_of(run(state, [output([piece(x)]) for x in "abc"])) == "a"


def test_a_stop_string_can_end_in_the_replacement_character_of_the_last_bytes() -> None:
    state = state_with("a\ufffd")
    deltas = run(state, [output([piece("a"), byte_ids("é")[0]], FinishReason.LENGTH)])
    assert (text_of(deltas), deltas[-1].finish_reason) == ("", FinishReason.STOP)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        state_with("a", "")


def test_cached_prompt_tokens_are_remembered() -> None:
    state = state_with()
    run(state, [output([piece("a")], num_cached_tokens=32), output([piece("b")])])
    assert state.num_cached_tokens == 32


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -1.0, [(token_id, -1.0)])


def test_logprobs_come_with_the_text_of_their_tokens_and_end_at_the_stop() -> None:
    state = state_with("cd")
    ids = [piece(x) for x in "abcd"]
    deltas = run(state, [output([token_id], logprobs=[logprob(token_id)]) for token_id in ids])
    assert [delta.logprobs for delta in deltas] == [[logprob(ids[0])], [logprob(ids[1])], []]


def test_a_token_that_a_stop_string_cuts_through_keeps_its_logprob() -> None:
    state = state_with("b")
    ids = [piece("ab"), piece("c")]
    (delta,) = run(state, [output(ids, logprobs=[logprob(token_id) for token_id in ids])])
    assert (delta.text, delta.logprobs) == ("a", [logprob(ids[0])])


def test_logprobs_are_absent_unless_the_engine_sends_them() -> None:
    deltas = run(state_with(), [output([piece("a")]), output([], FinishReason.LENGTH)])
    assert [delta.logprobs for delta in deltas] == [None, None]


token_strategy = st.one_of(
    st.sampled_from([piece(x) for x in ("a", "b", "ab", "é", "日")]),
    st.sampled_from(byte_ids("é日ab")),
    st.sampled_from(sorted(TINY.control_token_ids)),
)
stop_strategy = st.lists(
    st.one_of(st.text("ab", min_size=1, max_size=6), st.text("ab\ufffdé日", min_size=1, max_size=4)), max_size=3
)


def cut_text(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification: the text before the match that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            longest = max(matched, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.data(), st.lists(token_strategy, min_size=1, max_size=30), stop_strategy)
def test_streaming_equals_cutting_the_whole_text_however_tokens_arrive(
    data: st.DataObject, ids: list[int], stops: list[str]
) -> None:
    whole = TINY.decode(ids)
    expected, stop_reason = cut_text(whole, stops)
    outputs, rest = [], ids
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        outputs.append(output(rest[:count], logprobs=[logprob(token_id) for token_id in rest[:count]]))
        rest = rest[count:]
    outputs.append(output([], FinishReason.LENGTH))

    state = RequestState(TINY, StopConditions(strings=tuple(stops)))
    deltas = run(state, outputs)

    assert text_of(deltas) == expected
    assert deltas[-1].stop_reason == stop_reason
    assert [delta.finish_reason for delta in deltas].count(None) == len(deltas) - 1
    told = ""
    for delta in deltas[:-1]:
        told += delta.text
        assert not any(
            told.endswith(stop[:n]) and whole.startswith(told + stop[n:])
            for stop in stops
            for n in range(1, len(stop))
        )
        assert whole.startswith(told)  # no replacement character that a later byte turns into another
    told_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert told_ids == ids[: len(told_ids)]
    assert [entry.token_id for delta in deltas for entry in delta.logprobs or []] == told_ids
    if stop_reason is None:
        assert told_ids == ids
    all_at_once = RequestState(TINY, StopConditions(strings=tuple(stops)))
    (single,) = run(all_at_once, [output(ids, FinishReason.LENGTH)])
    assert (single.text, single.token_ids) == (expected, told_ids)


def test_a_real_tokenizers_reply_streams_without_loss(real_tokenizer: Tokenizer) -> None:
    text = " Hello 👩‍👩‍👧 𓀀!\n\nStop. Stopped?"
    ids = real_tokenizer.encode_text(text)
    state = RequestState(real_tokenizer, StopConditions(strings=("Stopp",)))
    deltas = run(state, [output([token_id]) for token_id in ids])
    assert text_of(deltas) == " Hello 👩‍👩‍👧 𓀀!\n\nStop. "
    assert not any("\ufffd" in delta.text for delta in deltas)


def test_all_generated_tokens_are_told_whatever_became_of_their_text() -> None:
    ids = [*byte_ids("é"), piece("a"), piece("b"), piece("c"), EOS]
    logprobs = [TokenLogprob(token_id, -float(index), []) for index, token_id in enumerate(ids)]
    outputs = [output([token_id], logprobs=[one]) for token_id, one in zip(ids, logprobs, strict=True)]
    outputs[-1] = output([EOS], FinishReason.STOP, stop_token_id=EOS, logprobs=[logprobs[-1]])
    state = state_with("cd")
    deltas = run(state, outputs)
    assert [token_id for delta in deltas for token_id in delta.generated_token_ids] == ids
    # The stop token has no text and no place among the reported tokens, but its likelihood counts.
    assert state.sum_of_logprobs == -sum(range(len(ids)))
    assert sum(len(delta.token_ids) for delta in deltas) == len(ids) - 1

    state = state_with("bc")
    deltas = run(state, outputs)
    assert [token_id for delta in deltas for token_id in delta.generated_token_ids] == ids[:-1]
    assert len(ids[:-1]) == state.num_generated


def test_control_tokens_have_a_text_where_they_are_not_skipped() -> None:
    ids = [piece("a"), TINY.bos_id, *byte_ids("é")[:1], TINY.eos_id, piece("b")]
    for skip in (True, False):
        state = RequestState(TINY, StopConditions(), skip_special_tokens=skip)
        deltas = run(state, [*(output([token_id]) for token_id in ids), output([], FinishReason.LENGTH)])
        assert text_of(deltas) == TINY.decode(ids, skip_special_tokens=skip)
