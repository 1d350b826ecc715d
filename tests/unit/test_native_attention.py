"""The native back end's attention against the reference's, with the norms, the rotation and the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.backend.base import AttentionLayer
from server.engine.inputs import AttentionMetadata, ModelInputs
from server.engine.models.config import AttentionSpec, KVGroupSpec, LayerSpec
from tests.one_torch_thread import one_torch_thread
from tests.unit.native_backends import (
    THREADS,
    Native,
    Reference,
    every_dtype,
    every_width,
    native_backend,
)
from tests.unit.test_native_ops import normal

__all__ = ["one_torch_thread"]  # a fixture

MIXED = ([1, 5, 1, 60, 1, 24, 1], [1, 5, 33, 62, 150, 24, 300])
"""New tokens and lengths of sequences: first tokens, decodes, whole prompts and a later chunk."""


class Attention:
    """One layer of one back end, and steps of sequences whose blocks are handed out in a random order."""

    def __init__(
        self,
        native: Native | Reference,
        spec: AttentionSpec,
        block_size: int,
        qk_norm: bool = True,
        poison: float = 0.0,
    ) -> None:
        self.native = native
        backend: Any = native.backend
        self.spec = spec
        self.block_size = block_size
        norms = [
            backend.prepare_norm(0.2 * normal(spec.head_dim, seed=seed)) if qk_norm else None for seed in (8, 9)
        ]
        self.layer: Any = AttentionLayer.of(LayerSpec(spec, 1e4, 2.0), 0, *norms, 1e-6)
        self.num_blocks = 0
        self.poison = poison

    def run(self, lengths: Sequence[int], steps: Sequence[Sequence[int]]) -> Tensor:
        """Computes sequences of these lengths in steps of so many new tokens each; all rows, by sequence."""
        spec = self.spec
        blocks_of = [-(-length // self.block_size) for length in lengths]
        group = KVGroupSpec("full", spec.window, (0,), spec.num_kv_heads, spec.head_dim)
        cache = self.native.backend.allocate_kv(group, sum(blocks_of), self.block_size)[0]
        if self.poison:
            for storage in (cache.keys, cache.values):
                torch.as_tensor(storage).view(self.native.dtype).fill_(self.poison)
        order = np.random.default_rng(0).permutation(sum(blocks_of)).astype(np.int32) + 1
        tables = np.split(order, np.cumsum(blocks_of)[:-1])
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        qkv = [normal(n, width, dtype=self.native.dtype, seed=i) for i, n in enumerate(lengths)]
        computed = [0] * len(lengths)
        results: list[list[Tensor]] = [[] for _ in lengths]
        for counts in steps:
            active = [i for i, count in enumerate(counts) if count]
            metadata = self._metadata(
                [tables[i] for i in active], [computed[i] for i in active], [counts[i] for i in active]
            )
            positions = np.concatenate([np.arange(computed[i], computed[i] + counts[i]) for i in active])
            inputs = ModelInputs(
                token_ids=np.zeros(len(positions), dtype=np.int64),
                previous_rows=np.full(len(positions), -1, dtype=np.int32),
                positions=positions,
                output_rows=np.zeros(0, dtype=np.int64),
                attention=(metadata,),
            )
            rows = torch.cat([qkv[i][computed[i] : computed[i] + counts[i]] for i in active])
            out = self.native.attention(rows, self.layer, cache, inputs)
            for i, part in zip(active, out.split([counts[i] for i in active]), strict=True):
                results[i].append(part)
                computed[i] += counts[i]
        assert computed == list(lengths)
        return torch.cat([part for parts in results for part in parts])

    def _metadata(self, tables: list[Any], computed: list[int], counts: list[int]) -> AttentionMetadata:
        size, window = self.block_size, self.spec.window
        table = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        slots = []
        for row, (blocks, start, count) in enumerate(zip(tables, computed, counts, strict=True)):
            positions = np.arange(start, start + count)
            slots.append(blocks[positions // size].astype(np.int64) * size + positions % size)
            # Blocks that no query of this step sees any more are the null block, as the KV manager has it.
            first = 0 if window is None else max(0, start - window + 1) // size
            table[row, first : len(blocks)] = blocks[first:]
        return AttentionMetadata(
            query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            seq_lens=np.array(computed, dtype=np.int32) + np.array(counts, dtype=np.int32),
            block_table=table,
            slot_mapping=np.concatenate(slots),
            block_size=size,
        )


def steps_of(new: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """What came before in one step, then the new tokens of all sequences in another."""
    return [[length - count for count, length in zip(new, lengths, strict=True)], list(new)]


def assert_equals_reference(
    level: str,
    dtype: torch.dtype,
    spec: AttentionSpec,
    block_size: int,
    qk_norm: bool = True,
    poison: float = 0.0,
) -> None:
    new, lengths = MIXED
    expected = Attention(Reference(dtype), spec, block_size, qk_norm).run(lengths, steps_of(new, lengths))
    for num_threads in THREADS:
        backend = Native(dtype, level, num_threads)
        ours = Attention(backend, spec, block_size, qk_norm, poison).run(lengths, steps_of(new, lengths))
        if dtype is torch.float32:
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        else:  # a key may round to the neighbouring bf16
            torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2**-7)


@every_width
@every_dtype
@pytest.mark.parametrize("window", [None, 1, 7, 33])
@pytest.mark.parametrize("block_size", [1, 5, 16, 32])
def test_mixed_batches_equal_the_reference(
    level: str, dtype: torch.dtype, window: int | None, block_size: int
) -> None:
    assert_equals_reference(level, dtype, AttentionSpec(4, 2, 32, 0.2, window, None), block_size)


@every_width
@every_dtype
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 1, 256), (8, 1, 64), (16, 16, 16), (6, 2, 24), (7, 1, 48)]
)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_every_shape_of_heads_equals_the_reference(
    level: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, softcap: float | None
) -> None:
    spec = AttentionSpec(num_heads, num_kv_heads, head_dim, 0.15, 40, softcap)
    assert_equals_reference(level, dtype, spec, block_size=16)


@every_width
@every_dtype
def test_layers_without_a_norm_of_queries_and_keys_equal_the_reference(level: str, dtype: torch.dtype) -> None:
    assert_equals_reference(level, dtype, AttentionSpec(4, 2, 32, 0.1, None, None), 16, qk_norm=False)


@every_width
@every_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(("window", "block_size"), [(None, 16), (6, 16), (None, 4), (6, 32)])
def test_what_other_sequences_left_in_a_block_does_not_leak(
    level: str, dtype: torch.dtype, poison: float, window: int | None, block_size: int
) -> None:
    assert_equals_reference(level, dtype, AttentionSpec(4, 2, 24, 0.2, window, None), block_size, poison=poison)


@every_width
@every_dtype
@pytest.mark.parametrize("window", [None, 70])
def test_a_row_depends_on_the_tokens_before_it_alone(
    level: str, dtype: torch.dtype, window: int | None
) -> None:
    """Bit for bit: not on chunks, batch, block size or threads."""
    spec = AttentionSpec(4, 1, 64, 0.12, window, None)
    lengths = [300, 140, 17]
    expected = Attention(Native(dtype, level), spec, 16).run(lengths, [lengths])
    ways = {
        "one sequence after the other": [[300, 0, 0], [0, 140, 0], [0, 0, 17]],
        "decodes beside chunks": [[299, 3, 16], [1, 137, 1]],
        "chunks of odd sizes": [[*(min(31, max(0, n - 31 * i)) for n in lengths)] for i in range(10)],
        "single tokens": [[*(int(i < n) for n in lengths)] for i in range(300)],
    }
    for name, steps in ways.items():
        for num_threads in THREADS:
            for block_size in (4, 32):
                attention = Attention(Native(dtype, level, num_threads), spec, block_size)
                assert torch.equal(attention.run(lengths, steps), expected), name


@every_width
def test_long_contexts_of_few_sequences_are_shared_out_among_the_threads(level: str) -> None:
    """Spans computed by different threads are merged in the same order as by one."""
    spec = AttentionSpec(2, 1, 32, 0.2, None, None)
    alone = Attention(Native(torch.float32, level, 1), spec, 16).run([1500], [[1499], [1]])
    shared = Attention(Native(torch.float32, level, 2), spec, 16).run([1500], [[1499], [1]])
    expected = Attention(Reference(torch.float32), spec, 16).run([1500], [[1499], [1]])
    assert torch.equal(alone, shared)
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)


def test_kv_storage_takes_what_it_says() -> None:
    backend = native_backend(torch.bfloat16)
    group = KVGroupSpec("full", None, (0, 2, 5), 2, 32)
    caches = backend.allocate_kv(group, num_blocks=7, block_size=16)
    total = sum(x.nbytes for cache in caches for x in (cache.keys, cache.values))
    assert total == 8 * backend.kv_bytes_per_block(group, 16)
