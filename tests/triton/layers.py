"""One attention layer of two back ends, on the same steps of the same sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.backend.base import AttentionLayer
from server.engine.backend.reference import ReferenceBackend
from server.engine.backend.triton.backend import TritonBackend
from server.engine.dtype import DType
from server.engine.inputs import AttentionMetadata, Int64Array, ModelInputs
from server.engine.models.config import AttentionSpec, KVGroupSpec, LayerSpec


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def dtype_of(dtype: torch.dtype) -> DType:
    return DType(str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Sequences:
    """So many sequences with their blocks dealt out in a random order, computed in steps.

    steps: for each step the new tokens of each sequence, 0 where it is not in the step.
    """

    steps: Sequence[Sequence[int]]
    block_size: int

    def inputs(self) -> list[tuple[list[int], ModelInputs]]:
        """For each step the sequences in it and its arrays. Tables are as wide as the longest needs."""
        lengths = np.sum(np.array(self.steps), axis=0)
        blocks_of = -(-lengths // self.block_size)
        order = np.random.default_rng(0).permutation(int(blocks_of.sum())).astype(np.int32) + 1
        tables = np.split(order, np.cumsum(blocks_of)[:-1])
        computed = [0] * len(lengths)
        result = []
        for counts in self.steps:
            active = [i for i, count in enumerate(counts) if count]
            new = np.array([counts[i] for i in active])
            starts = np.array([computed[i] for i in active])
            table = np.zeros((len(active), int(blocks_of.max())), dtype=np.int32)
            for row, i in enumerate(active):
                table[row, : len(tables[i])] = tables[i]
            positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, new, strict=True)])
            owner = np.repeat(np.arange(len(active)), new)
            slots = table[owner, positions // self.block_size].astype(np.int64) * self.block_size
            metadata = AttentionMetadata(
                query_start=np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
                seq_lens=(starts + new).astype(np.int32),
                block_table=table,
                slot_mapping=slots + positions % self.block_size,
                block_size=self.block_size,
            )
            result.append((active, _inputs(positions, metadata)))
            for i in active:
                computed[i] += counts[i]
        return result


class OneLayer:
    """An attention layer and its cache, of one back end."""

    def __init__(
        self,
        backend: ReferenceBackend | TritonBackend,
        device: torch.device,
        spec: AttentionSpec,
        dtype: torch.dtype,
        *,
        qk_norm: bool = False,
        poison: float = 0.0,
    ) -> None:
        """poison: what the cache holds before anything is stored."""
        self.backend: Any = backend
        self.device = device
        self.spec = spec
        self.dtype = dtype
        self.poison = poison
        norms = [
            backend.prepare_norm(0.2 * normal(spec.head_dim, seed=seed)) if qk_norm else None for seed in (8, 9)
        ]
        self.layer: Any = AttentionLayer.of(LayerSpec(spec, 1e4, 2.0), 0, *norms, 1e-6)

    def run(self, sequences: Sequences) -> list[Tensor]:
        """The layer's output of each step, on the CPU."""
        spec = self.spec
        group = KVGroupSpec("full", spec.window, (0,), spec.num_kv_heads, spec.head_dim)
        steps = sequences.inputs()
        num_blocks = max(int(inputs.attention[0].block_table.max()) for _, inputs in steps)
        cache = self.backend.allocate_kv(group, num_blocks, sequences.block_size)[0]
        if self.poison:
            for storage in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
                if storage is not None:
                    storage.copy_(torch.full(storage.shape, self.poison))
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        outputs = []
        for number, (_, inputs) in enumerate(steps):
            qkv = normal(len(inputs.positions), width, dtype=self.dtype, seed=number).to(self.device)

            def forward(step: Any, qkv: Tensor = qkv) -> Tensor:
                out: Tensor = self.backend.attention(qkv, self.layer, cache, step)
                return out

            outputs.append(self.all_rows(forward, inputs))
        return outputs

    def all_rows(self, forward: Any, inputs: ModelInputs) -> Tensor:
        result: Tensor = self.backend.capture(forward, len(inputs.positions))(inputs)
        return result.cpu()


def _inputs(positions: Int64Array, metadata: AttentionMetadata) -> ModelInputs:
    """A step whose result is wanted of all rows."""
    return ModelInputs(
        token_ids=np.zeros_like(positions),
        previous_rows=np.full(len(positions), -1, dtype=np.int32),
        positions=positions,
        output_rows=np.arange(len(positions), dtype=np.int64),
        attention=(metadata,),
    )
