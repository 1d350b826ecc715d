"""All between the fused projection and attention in one launch: query and key norms, rotation, storing.

Queries come out rotated; keys and values go straight into the slots of the cache, in 8 bits if it has them. All
is computed in fp32 and rounded once, keys and values to the model's dtype before anything else, as
`reference.ReferenceBackend` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.backend.base import AttentionLayer
from server.engine.backend.reference_attention import KVCache
from server.engine.backend.triton.e4m3 import scale_of
from server.engine.device_step.inputs import DeviceInputs


@triton.jit
def _quantize(x, QUANTIZED: tl.constexpr):
    """x over its scale, and the scale, such that the largest magnitude becomes that of e4m3."""
    scale = 1.0
    if QUANTIZED:
        scale = scale_of(tl.max(tl.abs(x), axis=0))
    return x / scale, scale


@triton.jit(
    # Kernels for each alignment of these would be compiled while requests wait.
    do_not_specialize_on_alignment=["positions", "slot_mapping"],
)
def rotate_and_store(
    qkv,
    q_out,
    keys,
    values,
    key_scales,
    value_scales,
    q_norm,
    k_norm,
    frequencies,
    positions,
    slot_mapping,
    eps,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Grid: (T, NUM_HEADS + 2 * KV_HEADS), a program for each head of each token.

    qkv: [T, NUM_HEADS + 2 * KV_HEADS, HEAD_DIM]; q_out: [T, NUM_HEADS, HEAD_DIM]; keys, values:
    [slots, KV_HEADS, HEAD_DIM], with QUANTIZED their scales fp32 [slots, KV_HEADS]; q_norm, k_norm: fp32
    [HEAD_DIM], the factors; frequencies: fp32 [HEAD_DIM / 2]; positions, slot_mapping: int32 [T].
    """
    row, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, HALF)
    x = qkv + (row.to(tl.int64) * (NUM_HEADS + 2 * KV_HEADS) + head) * HEAD_DIM
    dtype = qkv.dtype.element_ty
    slot = tl.load(slot_mapping + row).to(tl.int64)
    if head >= NUM_HEADS + KV_HEADS:
        whole = tl.arange(0, HEAD_DIM)
        value = tl.load(x + whole).to(tl.float32)
        place = slot * KV_HEADS + head - (NUM_HEADS + KV_HEADS)
        value, scale = _quantize(value, QUANTIZED)
        tl.store(values + place * HEAD_DIM + whole, value.to(values.dtype.element_ty))
        if QUANTIZED:
            tl.store(value_scales + place, scale)
        return

    first = tl.load(x + half).to(tl.float32)
    second = tl.load(x + HALF + half).to(tl.float32)
    if HAS_NORM:
        square = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / HEAD_DIM
        factor = 1.0 / tl.sqrt_rn(square + eps)
        weight = q_norm if head < NUM_HEADS else k_norm
        first = first * factor * tl.load(weight + half)
        second = second * factor * tl.load(weight + HALF + half)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + half)
    cos, sin = tl.cos(angle), tl.sin(angle)
    rotated_first = (first * cos - second * sin).to(dtype)
    rotated_second = (second * cos + first * sin).to(dtype)
    if head < NUM_HEADS:
        target = q_out + (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
        tl.store(target + half, rotated_first)
        tl.store(target + HALF + half, rotated_second)
    else:
        place = slot * KV_HEADS + head - NUM_HEADS
        first, second = rotated_first.to(tl.float32), rotated_second.to(tl.float32)
        if QUANTIZED:
            scale = scale_of(tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0)))
            tl.store(key_scales + place, scale)
            first, second = first / scale, second / scale
        stored = keys.dtype.element_ty
        tl.store(keys + place * HEAD_DIM + half, first.to(stored))
        tl.store(keys + place * HEAD_DIM + HALF + half, second.to(stored))


def apply_rotary(
    qkv: Tensor,
    layer: AttentionLayer[Tensor],
    frequencies: Tensor,
    cache: KVCache,
    step: DeviceInputs,
) -> Tensor:
    """qkv: [T, (heads + 2 * kv_heads) * head_dim]. Stores keys and values; returns q, [T, heads, head_dim]."""
    spec = layer.spec
    q = torch.empty((qkv.shape[0], spec.num_heads, spec.head_dim), dtype=qkv.dtype, device=qkv.device)
    rotate_and_store[(qkv.shape[0], spec.num_heads + 2 * spec.num_kv_heads)](
        qkv,
        q,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        layer.q_norm,
        layer.k_norm,
        frequencies,
        step.positions,
        step.groups[layer.group].slot_mapping,
        layer.eps,
        NUM_HEADS=spec.num_heads,
        KV_HEADS=spec.num_kv_heads,
        HEAD_DIM=spec.head_dim,
        HAS_NORM=layer.q_norm is not None,
        QUANTIZED=cache.key_scales is not None,
        num_warps=2,
    )
    return q
