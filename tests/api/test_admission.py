from __future__ import annotations

import pytest

from server.errors import ContextLengthError, InvalidRequestError, QueueFullError
from server.frontend.admission import Admission, check_text_length, check_token_ids, resolve_max_tokens
from tests.api.support import MAX_MODEL_LEN, MAX_SEQUENCE_TOKENS, VOCAB_SIZE, make_info


def test_no_more_permits_than_the_limit() -> None:
    admission = Admission(3)
    first = admission.acquire(2)
    with pytest.raises(QueueFullError):
        admission.acquire(2)
    admission.acquire(1)
    with pytest.raises(QueueFullError):
        admission.acquire(1)
    first.release()
    assert admission.in_flight == 1
    admission.acquire(2)


def test_releasing_twice_releases_once() -> None:
    admission = Admission(3)
    permit = admission.acquire(2)
    admission.acquire(1)
    permit.release()
    permit.release()
    assert admission.in_flight == 1


def test_what_could_never_be_admitted_is_a_mistake_not_a_full_queue() -> None:
    with pytest.raises(InvalidRequestError, match="3"):
        Admission(3).acquire(4)


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
