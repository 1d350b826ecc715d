"""The decoder on the Triton back end, against transformers in fp32."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from server.engine.backend.triton.backend import TritonBackend
from server.engine.dtype import DType
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


@cache
def triton_model(name: str, device: torch.device) -> GemmaModel:
    return load_model(read_hf(CONFIGS[name]), TritonBackend(device, DType.FLOAT32), checkpoint(name))


@pytest.mark.parametrize(
    "name",
    [
        "gemma1",
        "gemma1-multi-query",
        "gemma2-tight-softcaps",
        pytest.param("gemma3-rope-factor-8", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_transformers(name: str, device: torch.device) -> None:
    token_ids = prompt(WINDOW + 9)
    ours = our_logits(triton_model(name, device), token_ids, chunk=7, block_size=4)
    torch.testing.assert_close(ours.cpu(), hf_logits(name, token_ids), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_that_arrive_in_turn_are_continued_as_by_transformers(
    name: str, device: torch.device
) -> None:
    prompts = [prompt(length, seed=length) for length in (WINDOW + 2, 1, 17)]
    requests = [request(ids, request_id=f"r{index}", max_tokens=6) for index, ids in enumerate(prompts)]
    generated = Engine(triton_model(name, device), chunk=16).generate(requests, arrive_every=3)
    for token_ids, tokens in zip(prompts, generated, strict=True):
        assert_greedy(name, token_ids, tokens)
