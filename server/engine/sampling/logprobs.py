"""Log-probabilities for the client: of chosen tokens and of the likeliest ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from server.engine.sampling.blocks import BlockedLogits
from server.engine.sampling.draw import Floats
from server.engine.sampling.types import LOGPROB_FLOOR
from server.engine.types import PromptTokenLogprob, TokenLogprob


def gather_logprobs(
    logits: Tensor, chosen: Seq[int], num_top: Seq[int], also: Iterable[Seq[int]] = ()
) -> list[TokenLogprob]:
    """The log-softmax of logits [S, V] (float32, left unchanged) at `chosen[i]`, at the `num_top[i]` likeliest
    and at the ids of `also[i]`.

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
    own = _at(logits, rows, chosen) - normaliser

    ranked = {row: count for row, count in enumerate(num_top) if count > 0 and math.isfinite(largest[row])}
    listed = _likeliest(blocked, ranked)
    for row, ids in enumerate(also):
        named = zip(ids, _at(logits, [row] * len(ids), ids).tolist(), strict=True)
        listed[row] = list((dict(listed.get(row, [])) | dict(named)).items())
    return [
        TokenLogprob(
            token, _floored(own[row]), [(i, _floored(x - normaliser[row])) for i, x in listed.get(row, [])]
        )
        for row, token in enumerate(chosen)
    ]


def prompt_logprobs(logits: Tensor, chosen: Seq[int], num_top: Seq[int]) -> list[PromptTokenLogprob]:
    """As `gather_logprobs`, with the ranks of `chosen`."""
    if not chosen:
        return []
    index = torch.tensor(chosen, device=logits.device)[:, None]
    own = logits.gather(1, index)
    lower_ids = torch.arange(logits.shape[1], device=logits.device) < index
    before = ((logits > own) | ((logits == own) & lower_ids)).sum(dim=1)
    is_finite = logits.amax(dim=1).isfinite()  # NaN where the row has one
    ranks = torch.where(is_finite, before + 1, 0).tolist()
    return [
        PromptTokenLogprob(found.token_id, found.logprob, found.top, rank)
        for found, rank in zip(gather_logprobs(logits, chosen, num_top), ranks, strict=True)
    ]


def _at(logits: Tensor, rows: Seq[int], ids: Seq[int]) -> Floats:
    index = torch.tensor([list(rows), list(ids)], dtype=torch.int64, device=logits.device)
    return logits[index[0], index[1]].double().cpu().numpy()


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
