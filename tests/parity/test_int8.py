"""The decoder with weights in 8 bits: the native back end against the reference on the same rounded weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from server.engine.backend.reference import ReferenceBackend
from server.engine.dtype import DType
from server.engine.models.config_reader import read_hf
from server.engine.models.gemma import GemmaModel
from tests.parity.harness import (
    CONFIGS,
    WINDOW,
    Engine,
    checkpoint,
    load_model,
    our_logits,
    our_model,
    prompt,
    request,
)
from tests.unit.native_backends import CPU, every_level, native_backend

LENGTH = 3 * WINDOW + 5
NEAR = 5e-3
"""How far logits may be apart: the native back end rounds activations to 16 bits. Their deviation is 1 to 5."""


@cache
def native_model(name: str, level: str, dtype: torch.dtype = torch.float32) -> GemmaModel:
    backend = native_backend(dtype, level, quantization="int8")
    return load_model(read_hf(CONFIGS[name]), backend, checkpoint(name))


@cache
def reference_model(name: str) -> GemmaModel:
    backend = ReferenceBackend(CPU, DType.FLOAT32, "int8")
    return load_model(read_hf(CONFIGS[name]), backend, checkpoint(name))


@every_level
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_references_and_are_the_same_for_every_chunk_and_block_size(
    name: str, level: str
) -> None:
    token_ids = prompt(LENGTH)
    whole = our_logits(native_model(name, level), token_ids, LENGTH, block_size=16)
    expected = our_logits(reference_model(name), token_ids, LENGTH, block_size=16)
    torch.testing.assert_close(whole, expected, atol=NEAR, rtol=0)
    for chunk, block_size in ((1, 16), (3, 4), (7, 16)):
        assert torch.equal(our_logits(native_model(name, level), token_ids, chunk, block_size), whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_rounding_the_weights_changes_logits_a_little(name: str) -> None:
    """Far more than the two back ends differ, or the test above would show nothing, and far less than 1."""
    token_ids = prompt(LENGTH)
    rounded, plain = (our_logits(model(name), token_ids, LENGTH, 16) for model in (reference_model, our_model))
    error = (rounded - plain).square().mean().sqrt() / plain.std()
    assert (rounded - plain).abs().max() > 5 * NEAR
    assert error < 0.06


@every_level
def test_in_bf16_neither_company_nor_preemption_changes_a_token(level: str) -> None:
    model = native_model("gemma3", level, torch.bfloat16)
    requests = [
        request(prompt(length, seed=length), request_id=f"r{length}", temperature=1.0, seed=length)
        for length in (3 * WINDOW + 2, 1, WINDOW, 17)
    ]
    alone = [Engine(model).generate([one])[0] for one in requests]
    preempting = Engine(model, num_blocks=-(-(3 * WINDOW + 2 + 64) // 4) + 1, chunk=16)
    assert Engine(model, chunk=7).generate(requests, arrive_every=3) == alone
    assert preempting.generate(requests) == alone
    assert preempting.num_preemptions > 0
