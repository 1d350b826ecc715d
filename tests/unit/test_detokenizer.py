from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.frontend.detokenizer import Detokenizer
from server.tokenizer import Tokenizer
from tests.fixtures_tokenizers import make_tiny_tokenizer

TINY = make_tiny_tokenizer()
TEXTS = [
    " Hello",
    "   leading and trailing   ",
    "𓀀𓀁𓀂 hieroglyphs",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag",
    "日本語 mixed English テスト",
    "é and e\u0301",
    "\n\n\t\tcode:\n    return 1",
    "\x00\x01\x7f",
]


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_text_without_a_replacement_character(
    real_tokenizer: Tokenizer, text: str
) -> None:
    pieces = stream(real_tokenizer, real_tokenizer.encode_text(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.covers("R06")
def test_random_ids_stream_to_what_decode_gives(real_tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(1000):
        ids = [rng.choice((rng.randrange(600), rng.randrange(real_tokenizer.vocab_size))) for _ in range(12)]
        assert "".join(stream(real_tokenizer, ids)) == real_tokenizer.decode(ids)


@given(st.lists(st.integers(0, TINY.vocab_size + 3)))
def test_any_ids_stream_to_what_decode_gives(ids: list[int]) -> None:
    assert "".join(stream(TINY, ids)) == TINY.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_character_comes_whole_and_with_its_last_byte(text: str) -> None:
    ids = [8 + byte for byte in text.encode()]  # byte tokens
    pieces = stream(TINY, ids)
    assert "".join(pieces) == text
    expected = [piece for character in text for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert pieces == [*expected, ""]


def test_an_incomplete_character_is_held_until_the_end() -> None:
    detokenizer = Detokenizer(TINY)
    assert [detokenizer.push(8 + byte) for byte in "𓀀".encode()[:3]] == ["", "", ""]
    assert detokenizer.has_incomplete_character
    assert detokenizer.finish() == "\ufffd" * 3


def test_a_skipped_token_does_not_break_a_character() -> None:
    detokenizer = Detokenizer(TINY)
    first, second = (8 + byte for byte in "é".encode())
    assert [detokenizer.push(token_id) for token_id in (first, TINY.eos_id, second)] == ["", "", "é"]


def test_control_tokens_have_no_text() -> None:
    assert "".join(stream(TINY, [2, 5])) == ""


IDS = st.lists(st.integers(0, TINY.vocab_size + 3), max_size=6)


@given(before=IDS, ids=IDS, marked=st.sets(st.integers(0, TINY.vocab_size)), skip=st.booleans())
def test_tokens_that_are_whole_characters_come_at_once_as_they_come_one_by_one(
    before: list[int], ids: list[int], marked: set[int], skip: bool
) -> None:
    at_once, one_by_one = (
        Detokenizer(TINY, skip, {token_id: f"<{token_id}>" for token_id in marked}) for _ in range(2)
    )
    for token_id in before:
        assert at_once.push(token_id) == one_by_one.push(token_id)
    expected = "".join(one_by_one.push(token_id) for token_id in ids)
    text = at_once.whole(ids)
    assert text in (expected, None)
    if text is None:
        assert "".join(at_once.push(token_id) for token_id in ids) == expected
    assert at_once.finish() == one_by_one.finish()


def test_most_tokens_are_whole_characters() -> None:
    detokenizer = Detokenizer(TINY)
    assert detokenizer.whole(TINY.encode_text("hello")) == "hello"
    byte = 8 + "é".encode()[0]
    assert detokenizer.whole([byte]) is None
    detokenizer.push(byte)
    assert detokenizer.whole(TINY.encode_text("hello")) is None
