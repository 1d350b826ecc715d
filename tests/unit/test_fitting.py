"""What can never be served, whatever the load."""

from __future__ import annotations

import pytest

from server.errors import ContextLengthError, InvalidRequestError
from server.frontend.fitting import check_text_length, check_token_ids, resolve_max_tokens
from tests.api.support import MAX_MODEL_LEN, MAX_SEQUENCE_TOKENS, VOCAB_SIZE, make_info


def test_default_tokens_are_clipped_to_what_fits() -> None:
    def resolve(num_prompt: int, default: int | None) -> int:
        return resolve_max_tokens(
            num_prompt, None, make_info(), param="prompt", max_tokens_param="max_tokens", default=default
        )

    assert resolve(10, None) == MAX_SEQUENCE_TOKENS - 10
    assert resolve(10, 16) == 16
    assert resolve(MAX_SEQUENCE_TOKENS - 1, 16) == 1
    with pytest.raises(ContextLengthError):
        resolve(MAX_SEQUENCE_TOKENS, 16)


def test_ids_are_checked_against_the_embedding() -> None:
    for ids in ([], [0, VOCAB_SIZE - 1]):
        check_token_ids(ids, make_info(), "prompt")
    for ids in ([-1], [0, VOCAB_SIZE]):
        with pytest.raises(InvalidRequestError):
            check_token_ids(ids, make_info(), "prompt")


def test_a_text_s_length_bounds_its_tokens() -> None:
    check_text_length(31 * MAX_MODEL_LEN, MAX_MODEL_LEN, "prompt")
    with pytest.raises(ContextLengthError):
        check_text_length(33 * MAX_MODEL_LEN, MAX_MODEL_LEN, "prompt")
