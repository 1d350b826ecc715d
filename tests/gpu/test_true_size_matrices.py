"""Products with rounded matrices of the sizes that Gemma 2B and 7B have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton.backend import TritonBackend
from server.engine.dtype import DType

GPU = torch.device("cuda")
MATRICES = {
    "2b qkv": (2560, 2048),
    "2b gate and up": (32_768, 2048),
    "2b down": (2048, 16_384),
    "7b qkv": (12_288, 3072),
    "7b o": (3072, 4096),
    "7b gate and up": (49_152, 3072),
    "7b down": (3072, 24_576),
}
"""Outputs and inputs."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sides", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_products_are_the_reference_s(quantization: str, sides: tuple[int, int]) -> None:
    outputs, inputs = sides
    generator = torch.Generator(GPU).manual_seed(0)
    weight = torch.randn(outputs, inputs, device=GPU, dtype=torch.bfloat16, generator=generator) / inputs**0.5
    triton: Any = TritonBackend(GPU, DType.BFLOAT16, "auto", quantization)
    reference: Any = ReferenceBackend(GPU, DType.BFLOAT16, quantization)
    matrix = triton.prepare_linear(weight)
    for num_rows in (1, 7, 16, 32, 33, 64, 200, 1024):
        x = torch.randn(num_rows, inputs, device=GPU, dtype=torch.bfloat16, generator=generator)
        ours, expected = triton.linear(x, matrix).float(), reference.linear(x, matrix).float()
        assert (ours - expected).norm() < 5e-3 * expected.norm()
        # The same once more, and for as many rows in other company.
        assert torch.equal(triton.linear(x, matrix).float(), ours)
        assert torch.equal(triton.linear(x.flip(0).contiguous(), matrix).float().flip(0), ours)
