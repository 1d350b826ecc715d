"""Unified paged attention: prompt chunks and single tokens of a ragged batch in one launch.

A program computes BLOCK_M rows, which are the query heads that share one KV head (GROUP of them) for
BLOCK_M / GROUP neighbouring tokens of one sequence, so that keys and values are read once for all of them. It
walks over its visible keys in tiles with the online softmax (Milakov and Gimelshein, arXiv 1805.02867; tiled as
in FlashAttention-2, arXiv 2307.08691). Laws:

- Tiles outside causality and window are not visited; what lies in a visited tile but is not visible is never
  loaded, since a stale slot may hold a NaN.
- Where a batch has too few programs for the device, the keys of each are dealt out to several, its segments,
  whose partial results a second kernel adds up (split-KV, as in Flash-Decoding). Their number follows from
  shapes and bounds that the host knows, never from the lengths, so a launch can be replayed from a graph.
- Query i of a sequence sees key j if j <= i and, in a window of W, if j > i - W.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.backend.reference_attention import KVCache
from server.engine.backend.triton.parts import num_parts
from server.engine.device_step.inputs import DeviceInputs
from server.engine.models.config import AttentionSpec

_DECODE_ROWS = 16
"""The fewest rows that a tensor core multiplies."""
_MAX_SEGMENTS = 64
_TILES_PER_SEGMENT = 2
"""At least, at the longest length that a step may have: the sum over segments is not free."""
_SUMMED_AT_ONCE = tl.constexpr(8)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _find_sequence(query_start, q_block, num_seqs, BLOCK_Q: tl.constexpr):
    """The last sequence whose blocks begin at or before q_block, where sequence i has its blocks from
    query_start[i] // BLOCK_Q + i on."""
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= q_block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(
    # A kernel for each divisor and alignment of these would be compiled while requests wait.
    do_not_specialize=["table_row_stride", "table_column_stride", "num_seqs"],
    do_not_specialize_on_alignment=["query_start", "seq_lens", "block_table"],
)
def attend(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    out,
    partial_out,
    partial_max,
    partial_sum,
    query_start,
    seq_lens,
    block_table,
    table_row_stride,
    table_column_stride,
    num_seqs,
    scale,
    softcap,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DECODES_ONLY: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (query blocks, KV_HEADS, segments).

    q: [T, NUM_HEADS, HEAD_DIM]; keys, values: [blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]; out as q. With
    QUANTIZED, key_scales and value_scales: fp32 [blocks, BLOCK_SIZE, KV_HEADS]. With SPLIT the results go to
    partial_out, fp32 [T, NUM_HEADS, segments, HEAD_DIM], not normalised, and to partial_max and partial_sum,
    fp32 [T, NUM_HEADS, segments]. WINDOW: 0 for none.
    """
    q_block, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    if DECODES_ONLY:
        seq = q_block
        first_row = q_block
        num_new = 1
        first_token = 0
    else:
        seq = _find_sequence(query_start, q_block, num_seqs, BLOCK_Q)
        first_row = tl.load(query_start + seq)
        num_new = tl.load(query_start + seq + 1) - first_row
        first_token = (q_block - (first_row // BLOCK_Q + seq)) * BLOCK_Q
    if first_token >= num_new:
        return
    seq_len = tl.load(seq_lens + seq)
    first_position = seq_len - num_new + first_token

    rows = tl.arange(0, BLOCK_M)
    tokens = first_token + rows // GROUP
    positions = first_position + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    exists = tokens < num_new
    dims = tl.arange(0, HEAD_DIM)
    head_rows = (first_row + tokens).to(tl.int64) * NUM_HEADS + heads
    queries = tl.load(q + head_rows[:, None] * HEAD_DIM + dims[None, :], mask=exists[:, None], other=0.0)

    end_key = tl.minimum(first_position + BLOCK_Q, seq_len)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
    first_tile = first_key // TILE
    end_tile = tl.cdiv(end_key, TILE)
    if SPLIT:
        tiles_per_segment = tl.cdiv(end_tile - first_tile, tl.num_programs(2))
        first_tile += segment * tiles_per_segment
        end_tile = tl.minimum(first_tile + tiles_per_segment, end_tile)
        if first_tile >= end_tile:
            return

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for tile in range(first_tile, end_tile):
        key = tile * TILE + tl.arange(0, TILE)
        loaded = (key >= first_key) & (key < end_key)
        block = tl.load(
            block_table + seq * table_row_stride + (key // BLOCK_SIZE) * table_column_stride,
            mask=loaded,
            other=0,
        )
        slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
        k = tl.load(keys + slot[None, :] * HEAD_DIM + dims[:, None], mask=loaded[None, :], other=0.0)
        scores = tl.dot(queries, k.to(queries.dtype), input_precision="ieee") * scale
        if QUANTIZED:
            scores *= tl.load(key_scales + slot, mask=loaded, other=0.0)[None, :]
        if HAS_SOFTCAP:
            # tanh, by way of exp: 2 * sigmoid(2x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        visible = loaded[None, :] & (key[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible &= key[None, :] > positions[:, None] - WINDOW
        scores = tl.where(visible, scores * _LOG2_E, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen no key yet has nothing to rescale, and must not subtract infinities.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        rescale = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        v = tl.load(values + slot[:, None] * HEAD_DIM + dims[None, :], mask=loaded[:, None], other=0.0)
        if QUANTIZED:
            weights *= tl.load(value_scales + slot, mask=loaded, other=0.0)[None, :]
        summed = summed * rescale[:, None] + tl.dot(
            weights.to(queries.dtype), v.to(queries.dtype), input_precision="ieee"
        )
        largest = new_largest

    if SPLIT:
        partial = head_rows * tl.num_programs(2) + segment
        tl.store(partial_out + partial[:, None] * HEAD_DIM + dims[None, :], summed, mask=exists[:, None])
        tl.store(partial_max + partial, largest, mask=exists)
        tl.store(partial_sum + partial, total, mask=exists)
    else:
        total = tl.where(exists, total, 1.0)
        attended = (summed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + head_rows[:, None] * HEAD_DIM + dims[None, :], attended, mask=exists[:, None])


@triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["seq_lens"])
def add_segments(
    partial_out,
    partial_max,
    partial_sum,
    out,
    seq_lens,
    num_segments,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Sums up what `attend` left for a batch of one new token each. Grid: (T, NUM_HEADS)."""
    row, head = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(seq_len - WINDOW, 0)
    num_tiles = tl.cdiv(seq_len, TILE) - first_key // TILE
    num_used = tl.cdiv(num_tiles, tl.cdiv(num_tiles, num_segments))

    head_row = row.to(tl.int64) * NUM_HEADS + head
    first_partial = head_row * num_segments
    segments = tl.arange(0, MAX_SEGMENTS)
    used = segments < num_used
    maxima = tl.load(partial_max + first_partial + segments, mask=used, other=float("-inf"))
    largest = tl.max(maxima, axis=0)
    sums = tl.load(partial_sum + first_partial + segments, mask=used, other=0.0)
    total = tl.sum(sums * tl.exp2(maxima - largest), axis=0)

    dims = tl.arange(0, HEAD_DIM)
    summed = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, num_used, _SUMMED_AT_ONCE):
        segment = first + tl.arange(0, _SUMMED_AT_ONCE)
        partial = first_partial + segment
        rescale = tl.exp2(
            tl.load(partial_max + partial, mask=segment < num_used, other=float("-inf")) - largest
        )
        addends = tl.load(
            partial_out + partial[:, None] * HEAD_DIM + dims[None, :],
            mask=segment[:, None] < num_used,
            other=0.0,
        )
        summed += tl.sum(addends * rescale[:, None], axis=0)
    tl.store(out + head_row * HEAD_DIM + dims, (summed / total).to(out.dtype.element_ty))


class Launch(NamedTuple):
    """How `attend` is cut up for a device and a step."""

    block_m: int
    tile: int
    segments: int
    num_warps: int
    num_stages: int


def constants_of(spec: AttentionSpec, block_size: int, *, quantized: bool) -> dict[str, Any]:
    """`attend`'s constants that follow from a layer and its cache."""
    return {
        "NUM_HEADS": spec.num_heads,
        "KV_HEADS": spec.num_kv_heads,
        "HEAD_DIM": spec.head_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": spec.window or 0,
        "HAS_SOFTCAP": spec.softcap is not None,
        "QUANTIZED": quantized,
    }


class PagedAttention:
    """Launches the kernels for one device."""

    def __init__(self, num_multiprocessors: int, shared_memory: int) -> None:
        """shared_memory: bytes that one block of threads can have."""
        self.num_multiprocessors = num_multiprocessors
        self._shared_memory = shared_memory

    @classmethod
    def on(cls, device: torch.device) -> PagedAttention:
        """device: a GPU; for any other, those of a middling one."""
        if device.type != "cuda":
            return cls(num_multiprocessors=64, shared_memory=64 << 10)
        properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
        return cls(properties["multiprocessor_count"], properties["max_shared_mem"])

    def __call__(
        self, q: Tensor, cache: KVCache, spec: AttentionSpec, group: int, step: DeviceInputs
    ) -> Tensor:
        """q: [T, heads, head_dim], rotated; the step's keys and values are in the cache. Returns the same shape
        and dtype. Nothing waits for the device."""
        where = step.groups[group]
        num_seqs = step.seq_lens.shape[0]
        decodes_only = step.max_query_len == 1
        itemsize = cache.keys.element_size()
        if decodes_only:
            launch = self.plan_decodes(spec, itemsize, num_seqs, step.max_seq_len)
            num_q_blocks = num_seqs
        else:
            launch = self.plan_chunks(spec, itemsize, len(q))
            num_q_blocks = len(q) * spec.num_heads // (launch.block_m * spec.num_kv_heads) + num_seqs
        out = torch.empty_like(q)
        partial_out, partial_max, partial_sum = _workspace(q, launch.segments)
        attend[(num_q_blocks, spec.num_kv_heads, launch.segments)](
            q,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            out,
            partial_out,
            partial_max,
            partial_sum,
            step.query_start,
            step.seq_lens,
            where.block_table,
            where.block_table.stride(0),
            where.block_table.stride(1),
            num_seqs,
            spec.scale,
            spec.softcap or 1.0,
            **constants_of(spec, step.block_size, quantized=cache.key_scales is not None),
            DECODES_ONLY=decodes_only,
            SPLIT=launch.segments > 1,
            BLOCK_M=launch.block_m,
            TILE=launch.tile,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if launch.segments > 1:
            add_segments[(len(q), spec.num_heads)](
                partial_out,
                partial_max,
                partial_sum,
                out,
                step.seq_lens,
                launch.segments,
                NUM_HEADS=spec.num_heads,
                HEAD_DIM=spec.head_dim,
                WINDOW=spec.window or 0,
                TILE=launch.tile,
                MAX_SEGMENTS=_MAX_SEGMENTS,
            )
        return out

    # Tiles, warps and stages are the fastest of those that were tried on an H200, with 1,024 tokens of context
    # and heads of 256 numbers (ADR 0026).

    def plan_decodes(self, spec: AttentionSpec, itemsize: int, num_seqs: int, max_seq_len: int) -> Launch:
        """For a token of each sequence. itemsize: bytes of a number in the cache."""
        block_m = max(_DECODE_ROWS, spec.num_heads // spec.num_kv_heads)
        num_programs = num_seqs * spec.num_kv_heads
        tile = self._fitting_tile(spec, itemsize, 32)
        most = min(_MAX_SEGMENTS, max_seq_len // (_TILES_PER_SEGMENT * tile))
        segments = num_parts(num_programs, self.num_multiprocessors, most)
        if itemsize == 1:
            # What converts numbers of one byte to two takes registers.
            return Launch(block_m, tile, segments, num_warps=8, num_stages=2)
        if segments == 1 and self._has_room(itemsize):
            return Launch(block_m, 64, 1, num_warps=8, num_stages=3)
        num_warps = 4 if block_m * spec.head_dim <= _DECODE_ROWS * 256 else 8
        return Launch(block_m, tile, segments, num_warps, num_stages=2)

    def plan_chunks(self, spec: AttentionSpec, itemsize: int, num_tokens: int) -> Launch:
        """For any mix of sequences with so many new tokens."""
        group = spec.num_heads // spec.num_kv_heads
        if itemsize == 1:
            return Launch(max(64, group), self._fitting_tile(spec, itemsize, 32), 1, num_warps=8, num_stages=2)
        if not self._has_room(itemsize):
            return Launch(max(64, group), self._fitting_tile(spec, itemsize, 64), 1, num_warps=8, num_stages=2)
        # Larger blocks read keys and values less often, but must still be enough for all multiprocessors.
        if num_tokens * spec.num_heads >= 120 * self.num_multiprocessors:
            return Launch(max(128, group), 64, 1, num_warps=8, num_stages=2)
        return Launch(max(64, group), 64, 1, num_warps=4, num_stages=3)

    def _has_room(self, itemsize: int) -> bool:
        """For 64 keys and values of 16 bits in three stages, as on an H100."""
        return itemsize == 2 and self._shared_memory >= 200 << 10

    def _fitting_tile(self, spec: AttentionSpec, itemsize: int, most: int) -> int:
        """Keys and values of which two stages fit beside the queries."""
        fits = self._shared_memory // (4 * spec.head_dim * itemsize)
        return max(16, min(most, 1 << (fits.bit_length() - 1)))


def _workspace(q: Tensor, segments: int) -> tuple[Any, Any, Any]:
    if segments == 1:
        return None, None, None
    num_rows, num_heads, head_dim = q.shape
    sums = q.new_empty((2, num_rows, num_heads, segments), dtype=torch.float32)
    return q.new_empty((num_rows, num_heads, segments, head_dim), dtype=torch.float32), sums[0], sums[1]
