"""Unified paged attention, with the norms, the rotation and the cache, against the reference back end."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine.backend import fp8
from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton.attention import PagedAttention
from server.engine.backend.triton.backend import TritonBackend
from server.engine.models.config import AttentionSpec
from tests.triton.layers import OneLayer, Sequences, dtype_of

CPU = torch.device("cpu")

MIXED = [
    [20, 3, 0, 1],
    [1, 17, 1, 0],
    [1, 1, 1, 1],
    [9, 1, 0, 33],
]
"""First tokens, decodes, whole prompts, later chunks; one step has decodes only."""


def check(
    device: torch.device,
    spec: AttentionSpec,
    steps: list[list[int]] = MIXED,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    qk_norm: bool = False,
    kv_cache_dtype: str = "auto",
) -> None:
    sequences = Sequences(steps, block_size)
    reference = OneLayer(
        ReferenceBackend(CPU, dtype_of(dtype), "none", kv_cache_dtype), CPU, spec, dtype, qk_norm=qk_norm
    )
    # Whatever is loaded from a slot that nothing was stored in shows in the result.
    triton = OneLayer(
        TritonBackend(device, dtype_of(dtype), kv_cache_dtype),
        device,
        spec,
        dtype,
        qk_norm=qk_norm,
        poison=math.nan,
    )
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    for got, expected in zip(triton.run(sequences), reference.run(sequences), strict=True):
        got, expected = got.float(), expected.float()
        if dtype is torch.bfloat16 and kv_cache_dtype == "fp8":
            # Where one rounds a key up and the other down, the two lie a sixteenth apart in 8 bits.
            assert (got - expected).norm() < 1e-2 * expected.norm()
        else:
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def spec_of(
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 128,
    window: int | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window, softcap)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (16, 16)])
def test_heads(device: torch.device, heads: int, kv_heads: int) -> None:
    steps = [[5, 3], [1, 4], [1, 1]]
    check(device, spec_of(heads, kv_heads), steps)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_head_sizes(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    check(device, spec_of(head_dim=head_dim), dtype=dtype)


@pytest.mark.parametrize("window", [1, 7, 15, 16, 17, 33, 64])
def test_windows(device: torch.device, window: int) -> None:
    check(device, spec_of(window=window))


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(device: torch.device, softcap: float) -> None:
    check(device, spec_of(softcap=softcap, window=20))


@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 64, 24])
def test_page_sizes(device: torch.device, block_size: int) -> None:
    check(device, spec_of(window=21), block_size=block_size)


def test_query_and_key_norms(device: torch.device) -> None:
    check(device, spec_of(4, 2), qk_norm=True)


@pytest.mark.parametrize("window", [None, 100])
def test_long_decodes_in_segments(device: torch.device, window: int | None) -> None:
    steps = [[190, 1, 31, 32, 33], [1] * 5]
    attention = PagedAttention.on(CPU)
    assert attention.plan_decodes(spec_of(), itemsize=4, num_seqs=5, max_seq_len=191).segments > 1
    check(device, spec_of(window=window), steps)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keys_and_values_in_fp8(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    spec = spec_of(2, 2, head_dim=head_dim, window=19)
    check(device, spec, dtype=dtype, qk_norm=True, kv_cache_dtype="fp8")


def test_long_decodes_in_segments_in_fp8(device: torch.device) -> None:
    check(device, spec_of(), [[190, 31], [1, 1]], kv_cache_dtype="fp8")


def test_heads_that_are_zero_in_fp8() -> None:
    quantized, scales = fp8.quantize_rows(torch.zeros(1, 1, 128))
    assert quantized.float().eq(0).all()
    assert scales.eq(1).all()
