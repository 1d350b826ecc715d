"""What moderations take from the tokenizer."""

from __future__ import annotations

from server.moderation import answer_ids
from server.tokenizer import Tokenizer


def test_yes_and_no_are_single_tokens_of_gemma(gemma2_tokenizer: Tokenizer) -> None:
    assert [gemma2_tokenizer.token_text(token) for token in answer_ids(gemma2_tokenizer)] == ["Yes", "No"]
