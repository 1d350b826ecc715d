"""Paged attention in plain PyTorch: the oracle of every other attention.

Laws:

- Scores, softmax and the weighted sum are fp32, whatever the cache's dtype.
- Query i sees key j if j <= i and, in a window of W, if j > i - W. So every row sees at least itself.
- Only blocks that hold a visible key are gathered; what else lies in them is masked, and its values are zeroed,
  since a stale slot may hold a NaN.

Sequences with one new token (decodes) run as padded batches, longer chunks one by one in tiles of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.engine.backend import fp8
from server.engine.backend.scratch import Scratch
from server.engine.inputs import AttentionMetadata
from server.engine.models.config import AttentionSpec

_GATHER_TOKENS = 8192
"""Keys gathered for one batch of decodes at most (unless one sequence alone has more)."""
_TILE_QUERIES = 128
"""Queries of a chunk whose scores exist at one time."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values, each [blocks, block_size, kv_heads, head_dim].

    In the model's dtype, or in float8_e4m3fn with a scale for each token and head, by which what is stored is
    multiplied: the head's largest magnitude over the largest of e4m3.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    """fp32 [blocks, block_size, kv_heads], with float8 alone."""
    value_scales: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        zeros: Callable[[tuple[int, ...], torch.dtype], Tensor],
    ) -> KVCache:
        """shape: [blocks, block_size, kv_heads, head_dim]; zeros: allocates."""
        if dtype is not fp8.CODES:
            return cls(zeros(shape, dtype), zeros(shape, dtype))
        scales = (zeros(shape[:3], torch.float32) for _ in range(2))
        return cls(zeros(shape, dtype), zeros(shape, dtype), *scales)

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots: [T]; k, v: [T, kv_heads, head_dim] in the model's dtype."""
        for storage, scales, new in ((self.keys, self.key_scales, k), (self.values, self.value_scales, v)):
            if scales is not None:
                new, scale = fp8.quantize_rows(new)
                scales.view(-1, scales.shape[2]).index_copy_(0, slots, scale)
                # Not every operation knows float8; copying is the same for bytes.
                storage, new = storage.view(torch.uint8), new.view(torch.uint8)
            storage.view(-1, *new.shape[1:]).index_copy_(0, slots, new)


def kv_bytes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Bytes of a `KVCache` of this shape."""
    num_heads = math.prod(shape[:3])
    return 2 * num_heads * (shape[3] * dtype.itemsize + (4 if dtype is fp8.CODES else 0))


@dataclass(frozen=True, slots=True)
class _Decodes:
    rows: Tensor
    """[N]: the row of each sequence's query."""
    blocks: Tensor
    """[N * M]: the blocks of each sequence's visible keys, padded with block 0."""
    masked: Tensor
    """[N, M * block_size]: True where a gathered key is not to be seen."""


@dataclass(frozen=True, slots=True)
class _Tile:
    queries: slice
    """Rows of the step."""
    keys: slice
    """Of the chunk's gathered keys."""
    masked: Tensor
    """[queries, keys]"""


@dataclass(frozen=True, slots=True)
class _Chunk:
    blocks: Tensor
    """[M]: the blocks of the keys that any query of the chunk sees."""
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Index tensors of one KV group for one step, shared by its layers."""

    slots: Tensor
    """[T]"""
    decodes: tuple[_Decodes, ...]
    chunks: tuple[_Chunk, ...]


def plan_attention(metadata: AttentionMetadata, window: int | None, device: torch.device) -> AttentionPlan:
    """Says which blocks each query gathers and what it must not see of them."""
    new_counts = np.diff(metadata.query_start)
    first_positions = metadata.seq_lens - new_counts
    decoding = np.flatnonzero(new_counts == 1)
    return AttentionPlan(
        slots=torch.from_numpy(metadata.slot_mapping).to(device),
        decodes=tuple(_plan_decodes(metadata, decoding, window, device)),
        chunks=tuple(
            _plan_chunk(metadata, int(index), int(first_positions[index]), window, device)
            for index in np.flatnonzero(new_counts > 1)
        ),
    )


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache, spec: AttentionSpec, plan: AttentionPlan, scratch: Scratch
) -> Tensor:
    """Stores k and v in their slots, then attends. q: [T, heads, head_dim] fp32; k, v: [T, kv_heads, head_dim]
    in the model's dtype. Returns [T, heads * head_dim] fp32."""
    cache.store(plan.slots, k, v)
    q = (q * spec.scale).view(
        q.shape[0], spec.num_kv_heads, -1, spec.head_dim
    )  # [T, kv_heads, group, head_dim]
    out = torch.empty_like(q)
    for decodes in plan.decodes:
        _attend_decodes(q, cache, spec, decodes, scratch, out)
    for chunk in plan.chunks:
        _attend_chunk(q, cache, spec, chunk, scratch, out)
    return out.flatten(1)


# --- decodes -----------------------------------------------------------------------------------------------


def _plan_decodes(
    metadata: AttentionMetadata, decoding: np.ndarray, window: int | None, device: torch.device
) -> list[_Decodes]:
    """Batches of sequences of like length, so that padding and temporaries stay small."""
    block_size = metadata.block_size
    positions = metadata.seq_lens - 1
    oldest = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    first_blocks = oldest // block_size
    num_blocks = positions // block_size + 1 - first_blocks

    plans = []
    pending = decoding[np.argsort(num_blocks[decoding], kind="stable")[::-1]]
    while pending.size:
        width = int(num_blocks[pending[0]])
        members = pending[: max(1, _GATHER_TOKENS // (width * block_size))]
        pending = pending[members.size :]
        columns = first_blocks[members, None] + np.arange(width)  # [N, M]
        in_sequence = np.arange(width) < num_blocks[members, None]
        last_column = metadata.block_table.shape[1] - 1
        table = metadata.block_table[members[:, None], np.minimum(columns, last_column)]
        blocks = np.where(in_sequence, table, 0)
        keys = (columns[:, :, None] * block_size + np.arange(block_size)).reshape(members.size, -1)
        masked = (keys < oldest[members, None]) | (keys > positions[members, None])
        plans.append(
            _Decodes(
                rows=torch.from_numpy(metadata.query_start[members].astype(np.int64)).to(device),
                blocks=torch.from_numpy(blocks.reshape(-1).astype(np.int64)).to(device),
                masked=torch.from_numpy(masked).to(device),
            )
        )
    return plans


def _attend_decodes(
    q: Tensor, cache: KVCache, spec: AttentionSpec, decodes: _Decodes, scratch: Scratch, out: Tensor
) -> None:
    num, length = decodes.masked.shape
    shape = (num, length, spec.num_kv_heads, spec.head_dim)
    keys = _gather(cache.keys, cache.key_scales, decodes.blocks, "keys", scratch).view(shape).transpose(1, 2)
    scores = torch.matmul(q[decodes.rows], keys.transpose(2, 3))  # [N, kv_heads, group, L]
    probabilities = _softmax(scores, decodes.masked[:, None, None, :], spec.softcap)
    values = (
        _gather(cache.values, cache.value_scales, decodes.blocks, "values", scratch).view(shape).transpose(1, 2)
    )
    values.masked_fill_(decodes.masked[:, None, :, None], 0.0)
    out[decodes.rows] = torch.matmul(probabilities, values)


# --- chunks ------------------------------------------------------------------------------------------------


def _plan_chunk(
    metadata: AttentionMetadata, index: int, first_position: int, window: int | None, device: torch.device
) -> _Chunk:
    block_size = metadata.block_size
    seq_len = int(metadata.seq_lens[index])
    first_row = int(metadata.query_start[index])
    first_block = 0 if window is None else max(first_position - window + 1, 0) // block_size
    first_key = first_block * block_size
    blocks = metadata.block_table[index, first_block : -(-seq_len // block_size)]

    tiles = []
    for first in range(first_position, seq_len, _TILE_QUERIES):
        end = min(first + _TILE_QUERIES, seq_len)
        oldest = first_key if window is None else max(first - window + 1, first_key)
        keys, queries = np.arange(oldest, end), np.arange(first, end)[:, None]
        masked = keys > queries
        if window is not None:
            masked |= keys <= queries - window
        row = first_row + first - first_position
        tiles.append(
            _Tile(
                queries=slice(row, row + end - first),
                keys=slice(oldest - first_key, end - first_key),
                masked=torch.from_numpy(masked).to(device),
            )
        )
    return _Chunk(torch.from_numpy(blocks.astype(np.int64)).to(device), tuple(tiles))


def _attend_chunk(
    q: Tensor, cache: KVCache, spec: AttentionSpec, chunk: _Chunk, scratch: Scratch, out: Tensor
) -> None:
    all_keys = (
        _gather(cache.keys, cache.key_scales, chunk.blocks, "keys", scratch).flatten(0, 1).transpose(0, 1)
    )  # [kv_heads, L, D]
    all_values = (
        _gather(cache.values, cache.value_scales, chunk.blocks, "values", scratch).flatten(0, 1).transpose(0, 1)
    )
    for tile in chunk.tiles:
        queries = q[tile.queries].permute(1, 2, 0, 3)  # [kv_heads, group, t, D]
        num_kv_heads, group, num, head_dim = queries.shape
        keys = all_keys[:, tile.keys].transpose(1, 2)
        scores = torch.bmm(queries.reshape(num_kv_heads, group * num, head_dim), keys)
        scores = scores.view(num_kv_heads, group, num, -1)
        probabilities = _softmax(scores, tile.masked, spec.softcap).view(num_kv_heads, group * num, -1)
        attended = torch.bmm(probabilities, all_values[:, tile.keys])
        out[tile.queries] = attended.view(num_kv_heads, group, num, head_dim).permute(2, 0, 1, 3)


# --- both --------------------------------------------------------------------------------------------------


def _gather(storage: Tensor, scales: Tensor | None, blocks: Tensor, name: str, scratch: Scratch) -> Tensor:
    """The blocks in fp32: [M, block_size, kv_heads, head_dim]."""
    shape = (blocks.shape[0], *storage.shape[1:])
    if scales is not None:
        stored = storage.view(torch.uint8).index_select(0, blocks).view(storage.dtype)
        gathered = scratch.take(f"{name} in fp32", shape, torch.float32).copy_(stored)
        return gathered.mul_(scales.index_select(0, blocks)[..., None])
    gathered = scratch.take(name, shape, storage.dtype)
    torch.index_select(storage, 0, blocks, out=gathered)
    if storage.dtype is torch.float32:
        return gathered
    return scratch.take(f"{name} in fp32", shape, torch.float32).copy_(gathered)


def _softmax(scores: Tensor, masked: Tensor, softcap: float | None) -> Tensor:
    """Soft-caps, masks, normalises; overwrites the scores."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return torch.softmax(scores.masked_fill_(masked, float("-inf")), dim=-1)
