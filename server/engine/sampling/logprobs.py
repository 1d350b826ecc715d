"""Log-probabilities for the client: of chosen tokens and of the likeliest ones."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from server.engine.sampling.blocks import BlockedLogits
from server.engine.sampling.types import LOGPROB_FLOOR
from server.engine.types import TokenLogprob


def gather_logprobs(logits: Tensor, chosen: Seq[int], num_top: Seq[int]) -> list[TokenLogprob]:
    """The log-softmax of logits [S, V] (float32, left unchanged) at `chosen[i]` and at the `num_top[i]`
    likeliest.

    The likeliest come first, equal logits by id, so the first of them is the greedy choice. Every number is
    finite; a row that has no finite maximum gets LOGPROB_FLOOR for the chosen token and no likeliest ones.
    """
    if not chosen:
        return []
    blocked = BlockedLogits(logits)
    largest, _ = blocked.best()
    rows = list(range(len(chosen)))
    # Not torch.logsumexp, whose bits depend on the number of rows: see blocks.py.
    normaliser = np.array(largest) + np.log(blocked.masses(rows, np.ones(len(rows))).sum(axis=1))
    index = torch.tensor([rows, list(chosen)], device=logits.device)
    own = logits[index[0], index[1]].double().cpu().numpy() - normaliser

    ranked = {row: count for row, count in enumerate(num_top) if count > 0 and math.isfinite(largest[row])}
    likeliest = _likeliest(blocked, ranked)
    return [
        TokenLogprob(
            token, _floored(own[row]), [(i, _floored(x - normaliser[row])) for i, x in likeliest.get(row, [])]
        )
        for row, token in enumerate(chosen)
    ]


def _likeliest(blocked: BlockedLogits, counts: dict[int, int]) -> dict[int, list[tuple[int, float]]]:
    """For each row its `counts[row]` largest (id, logit)."""
    if not counts:
        return {}
    found = blocked.top(list(counts), max(counts.values()) + 1)
    result = {}
    for i, (row, wanted) in enumerate(counts.items()):
        count = min(wanted, blocked.vocab_size)
        values, ids = found.values[i], found.ids[i]
        if count > found.num_certain[i]:  # equal logits at the last place
            all_equal = blocked.at_least(row, float(values[count - 1]))
            values, ids = all_equal.values[0], all_equal.ids[0]
        result[row] = list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    return result


def _floored(logprob: float) -> float:
    return max(LOGPROB_FLOOR, float(logprob))  # in this order, max takes LOGPROB_FLOOR over NaN
