"""Chooses the next token of every sequence of a batch.

Laws:
1. A row's result depends on its logits, its sequence's parameters and tokens, and nothing else: not on the
   other rows, their number or their order, nor on earlier calls. The sampler has no state.
2. Suppressed ids and ids of probability zero are never chosen.
3. A row without a finite maximum (NaN, infinity, or nothing left to choose) fails alone.
4. Only rows that ask for a step pay for it. A batch of greedy rows costs one pass over the logits.
5. The order of steps: logprobs (of the model's own logits, as vLLM's raw_logprobs), suppressed ids and
   masks, the changes of `adjust_logits`, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from server.engine.sampling.blocks import BlockedLogits
from server.engine.sampling.draw import (
    DrawParams,
    Ints,
    draw_block,
    draw_column,
    draw_truncated,
    smallest_logit_needed,
)
from server.engine.sampling.logprobs import gather_logprobs, prompt_logprobs
from server.engine.sampling.penalties import adjust_logits
from server.engine.sampling.types import NOT_FINITE, NOTHING_LEFT, SampledToken, TokenMask, is_greedy
from server.engine.sequence import Sequence
from server.engine.types import PromptTokenLogprob, SamplingParams

_NUM_CANDIDATES = 256
"""Candidates for a row without top_k. A nucleus that holds more is found by `BlockedLogits.at_least`."""


class Sampler:
    """Chooses tokens below `vocab_size` that are not in `suppress_token_ids`."""

    def __init__(
        self, vocab_size: int, suppress_token_ids: tuple[int, ...], device: torch.device | str
    ) -> None:
        self._vocab_size = vocab_size
        suppressed = sorted({token for token in suppress_token_ids if token < vocab_size})
        self._suppressed = torch.tensor(suppressed, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, seqs: Seq[Sequence], masks: Mapping[int, TokenMask] | None = None
    ) -> list[SampledToken]:
        """One token for each row of logits [S, V] (any floating dtype, V >= vocab_size), which may be changed.

        Row i belongs to seqs[i]. `seqs[i].num_generated` picks the random number.

        Args:
            masks: by row; what they do not allow is suppressed.
        """
        logits = logits.float()
        reported = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        raw = logits[reported]

        logits[:, self._vocab_size :] = -math.inf  # rows that pad the embedding
        logits.index_fill_(1, self._suppressed, -math.inf)
        for row, mask in (masks or {}).items():
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocab_size]
            forbidden = torch.from_numpy(allowed == 0).to(logits.device)
            logits[row, : self._vocab_size].masked_fill_(forbidden, -math.inf)
        adjust_logits(logits, seqs)
        blocked = BlockedLogits(logits)
        largest, likeliest = blocked.best()
        drawn = _draw(blocked, {row: seq for row, seq in enumerate(seqs) if _is_random(seq, largest[row])})
        tokens = [drawn.get(row, token) for row, token in enumerate(likeliest)]

        num_top = [seqs[row].params.logprobs or 0 for row in reported]
        also = [
            [token for token in seqs[row].params.logprob_token_ids if token < self._vocab_size]
            for row in reported
        ]
        logprobs = gather_logprobs(raw, [tokens[row] for row in reported], num_top, also)
        logprob_of = dict(zip(reported, logprobs, strict=True))
        faults = map(_fault, largest)
        return [
            SampledToken(token, logprob_of.get(row)) if fault is None else SampledToken(-1, error=fault)
            for row, (token, fault) in enumerate(zip(tokens, faults, strict=True))
        ]

    @torch.inference_mode()
    def gather_logprobs(self, logits: Tensor, chosen: Seq[int], num_top: Seq[int]) -> list[PromptTokenLogprob]:
        """See `logprobs.prompt_logprobs`."""
        return prompt_logprobs(logits.float(), chosen, num_top)


def _is_random(seq: Sequence, largest: float) -> bool:
    return math.isfinite(largest) and not is_greedy(seq.params)


def _draw(blocked: BlockedLogits, seqs: dict[int, Sequence]) -> dict[int, int]:
    """Draws a token for each of these rows."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row, seq in seqs.items():
        groups[_num_candidates(seq.params, blocked.vocab_size)].append(row)
    drawn: dict[int, int] = {}
    for num_candidates, rows in groups.items():
        params = DrawParams.of([seqs[row] for row in rows], blocked.vocab_size)
        if num_candidates == 0:
            ids = _draw_from_all(blocked, rows, params)
        else:
            ids = _draw_from_top(blocked, rows, params, num_candidates)
        drawn.update(zip(rows, ids.tolist(), strict=True))
    return drawn


def _num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """How many of a row's largest logits to look at first; 0 where nothing is truncated."""
    if 0 < params.top_k < vocab_size:
        return (
            1 << params.top_k.bit_length()
        )  # above top_k, to see a tie cut off; few sizes, to search rows together
    return _NUM_CANDIDATES if params.top_p < 1.0 or params.min_p > 0.0 else 0


def _draw_from_all(blocked: BlockedLogits, rows: list[int], params: DrawParams) -> Ints:
    """Pure temperature: inverts the distribution in vocabulary order, first over blocks and then inside one."""
    block, rest = draw_block(blocked.masses(rows, params.temperature), params.uniform)
    return blocked.block_start(block) + draw_column(blocked.block(rows, block), params.temperature, rest)


def _draw_from_top(blocked: BlockedLogits, rows: list[int], params: DrawParams, num_candidates: int) -> Ints:
    """Inverts the truncated distribution in descending order; a row with too few candidates is searched
    again for all it may need."""
    candidates = blocked.top(rows, num_candidates)
    full_mass = np.full(len(rows), np.nan)
    uncut = (params.top_k == blocked.vocab_size) & (params.min_p == 0.0)
    if uncut.any():
        needed = [row for row, needs in zip(rows, uncut, strict=True) if needs]
        full_mass[uncut] = blocked.masses(needed, params.temperature[uncut]).sum(axis=1)
    drawn, enough = draw_truncated(candidates, params, full_mass)
    for i in np.flatnonzero(~enough).tolist():
        one, mass = params.row(i), full_mass[i : i + 1]
        bound = smallest_logit_needed(candidates.values[i], one, float(mass[0]), blocked.vocab_size)
        drawn[i] = draw_truncated(blocked.at_least(rows[i], bound), one, mass)[0][0]
    return drawn


def _fault(largest: float) -> str | None:
    """Why a row with this largest logit cannot be sampled, if it cannot."""
    if math.isfinite(largest):
        return None
    return NOTHING_LEFT if largest == -math.inf else NOT_FINITE
