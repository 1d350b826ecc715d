"""Logits in blocks of neighbouring ids: how a row of 262,144 is searched without being sorted.

One pass takes the maximum of each block of 64 (torch's amax runs at memory speed, its max with indices at a
tenth of that). The argmax then lies in the first block with the largest maximum, and the k largest logits lie
in the k blocks with the largest maxima. One more pass, for the rows that need it, sums the weights of each
block; a draw in vocabulary order picks a block first and then looks inside it.

Law: what is computed for a row is bit for bit a function of that row alone. Every reduction here runs inside
one block or one row and yields many results. (Over a single row, torch may split a sum among threads: logsumexp
of one row differs in the last bits from that of the same row in a batch.)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from server.engine.sampling.draw import Candidates, Floats, Ints

_BLOCK_WIDTH = 64
"""Divides every Gemma's vocabulary: 256,000, 262,144 and 262,208."""
_ROWS_AT_ONCE = 8
"""Bounds the scratch memory of `masses` to 8 MiB."""


class BlockedLogits:
    """A view of logits [S, V] in float32, which must not change while it is in use."""

    def __init__(self, logits: Tensor) -> None:
        self.vocab_size = logits.shape[1]
        self._width = math.gcd(self.vocab_size, _BLOCK_WIDTH)
        self._blocks = logits.view(len(logits), self.vocab_size // self._width, self._width)  # [S, B, W]
        self._maxima = self._blocks.amax(dim=2)  # [S, B]; NaN where the block has one

    def best(self) -> tuple[list[float], list[int]]:
        """Each row's largest logit (NaN if it has a NaN) and the lowest id that has it."""
        largest, block = self._maxima.max(dim=1)  # of equal ones, torch.max gives the first
        inside = self._blocks[torch.arange(len(block), device=block.device), block]
        ids = block * self._width + inside.max(dim=1).indices
        values, tokens = torch.stack((largest.double(), ids.double())).tolist()
        return values, [int(token) for token in tokens]

    def top(self, rows: list[int], count: int) -> Candidates:
        """The `count` largest logits of each of `rows`."""
        count = min(count, self.vocab_size)
        row = torch.tensor(rows, device=self._maxima.device)
        num_blocks = min(count, self._maxima.shape[1])
        block = self._maxima[row].topk(num_blocks, sorted=False).indices.sort().values  # [R, N]
        pool = self._blocks[row[:, None], block].flatten(1)  # [R, N * W], by id
        pool_ids = (block[:, :, None] * self._width + torch.arange(self._width, device=row.device)).flatten(1)
        # topk leaves the order of equal logits open; by position, then stably by value, it is by id.
        position = pool.topk(count, sorted=False).indices.sort().values
        values, order = pool.gather(1, position).sort(descending=True, stable=True)
        ids = pool_ids.gather(1, position.gather(1, order))
        return _candidates(values, ids, all_tokens=count == self.vocab_size)

    def at_least(self, row: int, bound: float) -> Candidates:
        """All logits of one row that are >= `bound`, sorted; the row's largest must be among them."""
        logits = self._blocks[row].flatten()
        ids = (logits >= bound).nonzero().squeeze(1)
        values, order = logits[ids].sort(descending=True, stable=True)
        values, ids = values[None], ids[order][None]
        return Candidates(_floats(values), ids.cpu().numpy(), np.array([values.shape[1]]), np.array([False]))

    def masses(self, rows: list[int], temperature: Floats) -> Floats:
        """The summed weights exp((logit - largest) / temperature) of each block. [R], [R] -> [R, B]"""
        device = self._maxima.device
        row = torch.tensor(rows, device=device)
        divisor = torch.from_numpy(temperature).to(device, torch.float32)
        sums = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            largest = self._maxima[row[part]].amax(dim=1)
            weights = self._blocks.index_select(0, row[part])
            weights.sub_(largest[:, None, None]).div_(divisor[part, None, None]).exp_()
            sums.append(weights.sum(dim=2))
        return _floats(torch.cat(sums))

    def block(self, rows: list[int], block: Ints) -> Floats:
        """The logits of one block of each row. [R], [R] -> [R, W]"""
        device = self._maxima.device
        return _floats(self._blocks[torch.tensor(rows, device=device), torch.from_numpy(block).to(device)])

    def block_start(self, block: Ints) -> Ints:
        """The first id of each block."""
        return block * self._width


def _candidates(values: Tensor, ids: Tensor, all_tokens: bool) -> Candidates:
    table = _floats(values)
    last = table[:, -1:]
    exhausted = np.logical_or(all_tokens, np.isneginf(last[:, 0]))
    num_certain = np.where(exhausted, table.shape[1], (table > last).sum(axis=1))
    return Candidates(table, ids.cpu().numpy(), num_certain, exhausted)


def _floats(tensor: Tensor) -> Floats:
    return tensor.double().cpu().numpy()
