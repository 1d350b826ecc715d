"""The processes that compute one model together, and what they tell each other.

Rank 0 is the engine's process: it schedules, samples and alone knows the requests. Before each forward pass it
announces the step's arrays; in it, all ranks add up their partial sums. Nothing else is exchanged. Laws:

1. All ranks compute the same steps in the same order.
2. A rank that ends, for whatever reason, makes the others raise in what they exchange next, and so end.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from server.engine.backend.base import AnyBackend, PreparedWeights
from server.engine.inputs import AttentionMetadata, ModelInputs
from server.engine.models.config import GemmaConfig
from server.engine.models.gemma import GemmaModel

START_SECONDS = 600.0
"""For all ranks to have come: the first may have to wait for another host to be given its pod."""
_IDLE = datetime.timedelta(days=3650)
"""Without requests nothing is announced, for any time."""


def open_store(host: str, port: int, num_ranks: int, *, is_leader: bool) -> TCPStore:
    """Where the ranks find each other. port: 0 for any that is free. Raises RuntimeError."""
    return TCPStore(
        host, port, num_ranks, is_leader, datetime.timedelta(seconds=START_SECONDS), wait_for_workers=False
    )


def presence_key(rank: int) -> str:
    """In the store, once the rank is there."""
    return f"here/{rank}"


class Ranks:
    """This process's connection to the others."""

    def __init__(self, rank: int, num_ranks: int, store: TCPStore, device: str) -> None:
        """Waits for all ranks, for as long as it takes. Raises RuntimeError."""
        store.set(presence_key(rank), "here")
        self.rank = rank
        self.num_ranks = num_ranks
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=_IDLE)
        self._of_hosts = dist.new_group(backend="gloo", timeout=_IDLE)
        """In the hosts' memory, where the steps' arrays are."""

    def model(self, config: GemmaConfig, backend: AnyBackend, weights: PreparedWeights) -> GemmaModel:
        """This rank's part of a model, of which `config` and `weights` are."""
        return _ShardedModel(config, backend, weights, self)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in its place."""
        dist.all_reduce(x)
        return x

    def broadcast(self, numbers: Sequence[int]) -> list[int]:
        """Rank 0's numbers, of which all ranks know how many there are."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(tensor, 0, group=self._of_hosts)
        return tensor.tolist()

    def announce(self, inputs: ModelInputs) -> None:
        """By rank 0: what all compute next. Its token ids are all known to the host."""
        metadata = inputs.attention[0]
        num_seqs, num_columns = metadata.block_table.shape
        sizes = (
            len(inputs.token_ids),
            num_seqs,
            len(inputs.output_rows),
            len(inputs.attention),
            num_columns,
            metadata.block_size,
        )
        self.broadcast(sizes)
        arrays: list[npt.NDArray[np.integer]] = [inputs.token_ids, inputs.positions, inputs.output_rows]
        arrays += [metadata.query_start, metadata.seq_lens]
        for group in inputs.attention:
            arrays += [group.block_table.reshape(-1), group.slot_mapping]
        packed = np.concatenate(arrays, dtype=np.int64)
        dist.broadcast(torch.from_numpy(packed), 0, group=self._of_hosts)

    def receive(self) -> ModelInputs:
        """By the others: what `announce` was given."""
        num_tokens, num_seqs, num_rows, num_groups, num_columns, block_size = self.broadcast([0] * 6)
        of_group = [num_seqs * num_columns, num_tokens]
        sizes = [num_tokens, num_tokens, num_rows, num_seqs + 1, num_seqs, *of_group * num_groups]
        packed = torch.empty(sum(sizes), dtype=torch.int64)
        dist.broadcast(packed, 0, group=self._of_hosts)
        token_ids, positions, output_rows, query_start, seq_lens, *groups = np.split(
            packed.numpy(), np.cumsum(sizes)[:-1]
        )
        attention = tuple(
            AttentionMetadata(
                query_start=query_start.astype(np.int32),
                seq_lens=seq_lens.astype(np.int32),
                block_table=table.astype(np.int32).reshape(num_seqs, num_columns),
                slot_mapping=slots,
                block_size=block_size,
            )
            for table, slots in zip(groups[::2], groups[1::2], strict=True)
        )
        return ModelInputs(
            token_ids=token_ids,
            previous_rows=np.full(num_tokens, -1, dtype=np.int32),
            positions=positions,
            output_rows=output_rows,
            attention=attention,
        )


class _ShardedModel(GemmaModel):
    """On rank 0, computing a step has the others compute it, too."""

    def __init__(
        self, config: GemmaConfig, backend: AnyBackend, weights: PreparedWeights, ranks: Ranks
    ) -> None:
        super().__init__(config, backend, weights, ranks.all_reduce)
        self._ranks = ranks

    def capture(self, caches: Sequence[Any], max_tokens: int) -> Callable[[ModelInputs], Any]:
        forward = super().capture(caches, max_tokens)
        if self._ranks.rank > 0:
            return forward

        def run(inputs: ModelInputs) -> Any:
            self._ranks.announce(inputs)
            return forward(inputs)

        return run
