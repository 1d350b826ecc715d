"""The keys and values of one layer as the kernels read and write them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TritonKVCache:
    keys: Tensor
    """[blocks, block_size, kv_heads, head_dim] in the model's dtype or float8_e4m3fn"""
    values: Tensor
    """As keys."""
    key_scales: Tensor | None = None
    """fp32 [blocks, block_size, kv_heads], with float8 alone: what the stored numbers are multiplied by."""
    value_scales: Tensor | None = None
