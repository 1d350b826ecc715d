"""Attention over heads and contexts of the size of Gemma 2B's and 7B's, in bf16 and in fp8."""

from __future__ import annotations

import pytest
import torch

from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton.backend import TritonBackend
from server.engine.dtype import DType
from server.engine.models.config import AttentionSpec
from tests.triton.layers import OneLayer, Sequences

GPU = torch.device("cuda")

GEMMA_2B = AttentionSpec(8, 1, 256, 1 / 16, None, None)
GEMMA_7B = AttentionSpec(16, 16, 256, 1 / 16, None, None)
GEMMA_2_9B = AttentionSpec(16, 8, 256, 1 / 16, 700, 50.0)

STEPS = {
    "one": [[1100], [1], [1]],
    "chunks beside decodes": [[300, 0, 1300, 5], [1, 900, 1, 700], [1, 1, 1, 1]],
    "many": [[70 + 3 * index for index in range(40)], [1] * 40, [1] * 40],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("spec", [GEMMA_2B, GEMMA_7B, GEMMA_2_9B], ids=["2b", "7b", "2-9b"])
def test_attention_is_the_reference_s(spec: AttentionSpec, kv_cache_dtype: str, steps: list[list[int]]) -> None:
    sequences = Sequences(steps, block_size=16)
    dtype, bf16 = DType.BFLOAT16, torch.bfloat16
    reference = OneLayer(ReferenceBackend(GPU, dtype, "none", kv_cache_dtype), GPU, spec, bf16)
    triton = OneLayer(TritonBackend(GPU, dtype, kv_cache_dtype), GPU, spec, bf16, poison=float("nan"))
    for got, expected in zip(triton.run(sequences), reference.run(sequences), strict=True):
        assert (got.float() - expected.float()).norm() < 1e-2 * expected.float().norm()
