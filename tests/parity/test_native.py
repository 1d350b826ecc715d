"""The decoder on the native back end, against transformers in fp32 and against itself bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel
from tests.parity.harness import (
    CONFIGS,
    WINDOW,
    Engine,
    assert_greedy,
    checkpoint,
    hf_logits,
    load_model,
    our_logits,
    prompt,
    request,
)
from tests.unit.native_backends import every_level, every_width, native_backend

LENGTH = 3 * WINDOW + 5
PROMPTS = [prompt(length, seed=length) for length in (3 * WINDOW + 2, 1, WINDOW, 17, 4 * WINDOW + 1)]
REQUESTS = [request(token_ids, request_id=f"r{index}") for index, token_ids in enumerate(PROMPTS)]


@cache
def native_model(name: str, level: str, dtype: torch.dtype = torch.float32) -> GemmaModel:
    return load_model(read_hf(CONFIGS[name]), native_backend(dtype, level), checkpoint(name))


@every_width
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_and_are_the_same_for_every_chunk_and_block_size(
    name: str, level: str
) -> None:
    token_ids = prompt(LENGTH)
    whole = our_logits(native_model(name, level), token_ids, LENGTH, block_size=16)
    torch.testing.assert_close(whole, hf_logits(name, token_ids), atol=1e-4, rtol=0)
    for chunk, block_size in ((1, 16), (2, 1), (3, 4), (5, 32), (7, 16), (16, 5)):
        assert torch.equal(our_logits(native_model(name, level), token_ids, chunk, block_size), whole)


@every_width
@pytest.mark.parametrize("name", ["gemma1", "gemma3-rope-factor-8"])
def test_logits_far_into_the_context_equal_transformers(name: str, level: str) -> None:
    token_ids = prompt(2100, seed=3)
    ours = our_logits(native_model(name, level), token_ids, chunk=700, block_size=16)
    torch.testing.assert_close(ours[-50:], hf_logits(name, token_ids)[-50:], atol=1e-4, rtol=0)


@every_width
@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_that_arrive_in_turn_are_continued_as_by_transformers(
    name: str, chunk: int, level: str
) -> None:
    generated = Engine(native_model(name, level), chunk=chunk).generate(REQUESTS, arrive_every=3)
    for token_ids, tokens in zip(PROMPTS, generated, strict=True):
        assert_greedy(name, token_ids, tokens)


@pytest.mark.covers("K01", "K02", "K07", "K08")
@every_level
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_in_bf16_neither_company_nor_preemption_nor_a_cached_prefix_changes_a_token(
    name: str, level: str
) -> None:
    """Under sampling, where a last bit would show sooner or later."""
    model = native_model(name, level, torch.bfloat16)
    requests = [
        request(token_ids, request_id=f"r{index}", temperature=1.0, seed=index)
        for index, token_ids in enumerate(PROMPTS)
    ]
    alone = [Engine(model).generate([one])[0] for one in requests]
    longest = max(map(len, PROMPTS)) + 64
    preempting = Engine(model, num_blocks=-(-longest // 4) + 1, chunk=16)
    caching = Engine(model, prefix_caching=True)
    assert Engine(model, chunk=7).generate(requests, arrive_every=3) == alone
    assert preempting.generate(requests) == alone
    assert preempting.num_preemptions > 0
    assert caching.generate(requests) == alone
    assert caching.generate(requests) == alone


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "logprobs": 2},
    "penalised": {"temperature": 0.5, "repetition_penalty": 1.1, "frequency_penalty": -0.5},
    "no-stop-before": {"temperature": 0.7, "min_tokens": 20, "stop_token_ids": tuple(range(0, 67, 5))},
}


@every_level
@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_in_bf16_guesses_change_no_token(params: dict[str, Any], level: str) -> None:
    model = native_model("gemma3", level, torch.bfloat16)
    requests = [
        request(token_ids * 3, request_id=f"r{index}", seed=index, **params)
        for index, token_ids in enumerate(PROMPTS)
    ]
    without = Engine(model).generate(requests)
    longest = 3 * max(map(len, PROMPTS)) + 64
    guessing = Engine(model, max_draft_tokens=5, chunk=16)
    tight = Engine(model, max_draft_tokens=9, num_blocks=-(-longest // 4) + 1, chunk=7, prefix_caching=True)
    assert guessing.generate(requests, arrive_every=20) == without
    assert tight.generate(requests) == without
    assert guessing.num_accepted_tokens > 0
    assert tight.num_preemptions > 0
