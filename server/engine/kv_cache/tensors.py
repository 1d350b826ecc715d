"""The storage behind the block ids: a back end's pools, found by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engine.backend.base import AnyBackend
from server.engine.models.config import KVGroupSpec


class KVTensors:
    """Allocates every pool at once, for good; what is in them is the back end's and the manager's."""

    def __init__(
        self, backend: AnyBackend, groups: Sequence[KVGroupSpec], num_blocks: Sequence[int], block_size: int
    ) -> None:
        """num_blocks[g]: usable blocks of group g; storage has the null block 0 besides."""
        self.block_size = block_size
        self.num_groups = len(groups)
        caches: dict[int, Any] = {}
        self.num_bytes = 0
        for group, count in zip(groups, num_blocks, strict=True):
            caches.update(zip(group.layer_indices, backend.allocate_kv(group, count, block_size), strict=True))
            self.num_bytes += (count + 1) * backend.kv_bytes_per_block(group, block_size)
        self.by_layer = [caches[index] for index in range(len(caches))]
