"""The decoder's logits against transformers' eager attention on the same weights, in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from server.engine.dtype import DType
from tests.parity.harness import (
    CONFIGS,
    VOCAB,
    WINDOW,
    hf_logits,
    hf_model,
    logits_of,
    our_logits,
    our_model,
    prompt,
)

LENGTH = 3 * WINDOW + 5
CHUNKS = [1, 2, 3, 5, 7, 16, LENGTH]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_for_every_chunk_size(name: str, chunk: int) -> None:
    token_ids = prompt(LENGTH)
    ours = our_logits(our_model(name), token_ids, chunk, block_size=4)
    torch.testing.assert_close(ours, hf_logits(name, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 5, LENGTH])
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_logits_equal_transformers_for_every_block_size(name: str, chunk: int, block_size: int) -> None:
    token_ids = prompt(LENGTH, seed=1)
    ours = our_logits(our_model(name), token_ids, chunk, block_size)
    torch.testing.assert_close(ours, hf_logits(name, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "length", sorted({*range(1, 6), *range(WINDOW - 1, WINDOW + 2), 15, 16, 17, 31, 32, 33})
)
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_prompts_that_end_around_the_window_and_around_a_block_equal_transformers(
    name: str, length: int
) -> None:
    token_ids = prompt(length, seed=2)
    ours = our_logits(our_model(name), token_ids, chunk=64, block_size=16)
    torch.testing.assert_close(ours, hf_logits(name, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma1", "gemma3-rope-factor-8"])
def test_logits_far_into_the_context_equal_transformers(name: str) -> None:
    """Rotary angles from rounded positions (bf16, int8) would be off from a few hundred tokens on."""
    token_ids = prompt(2100, seed=3)
    ours = our_logits(our_model(name), token_ids, chunk=700, block_size=16)
    torch.testing.assert_close(ours[-50:], hf_logits(name, token_ids)[-50:], atol=1e-4, rtol=0)


def test_a_token_outside_every_window_does_not_matter() -> None:
    """Through three sliding layers, position i depends on i - 3 * (WINDOW - 1) .. i and nothing earlier."""
    model = our_model("gemma3-all-sliding")
    reach = 3 * (WINDOW - 1)
    token_ids = prompt(reach + 2)
    changed = [(token_ids[0] + 1) % VOCAB, *token_ids[1:]]
    before, after = (our_logits(model, ids, chunk=7, block_size=4) for ids in (token_ids, changed))
    torch.testing.assert_close(after[reach + 1], before[reach + 1], atol=0, rtol=0)
    assert (after[reach] - before[reach]).abs().max() > 1e-6


def test_tight_soft_caps_bound_the_logits() -> None:
    logits = our_logits(our_model("gemma2-tight-softcaps"), prompt(LENGTH), chunk=LENGTH, block_size=4)
    assert logits.abs().max() <= 1.5
    assert logits.abs().max() > 1.0, "the cap is reached, or this shows nothing"


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3", "gemma1-wide-as-7b"])
def test_bf16_loses_no_more_than_transformers_in_bf16_does(name: str) -> None:
    """Both are compared with fp32 arithmetic on the same, bf16, weights."""
    token_ids = prompt(LENGTH)
    in_bf16 = copy.deepcopy(hf_model(name)).to(torch.bfloat16)
    exact = logits_of(copy.deepcopy(in_bf16).float(), token_ids)
    theirs = logits_of(in_bf16, token_ids)
    ours = our_logits(our_model(name, DType.BFLOAT16), token_ids, chunk=LENGTH, block_size=4)
    assert mean_square(ours - exact) < 1.5 * mean_square(theirs - exact)


def mean_square(x: torch.Tensor) -> float:
    return float(x.square().mean())
