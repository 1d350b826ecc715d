"""What the samplers share and hand to the scheduler. Free of torch, so that the scheduler may import it."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from server.engine.types import SamplingParams, TokenLogprob

TokenMask = NDArray[np.uint32]
"""Which tokens can be sampled: bit i % 32 of word i // 32 for token i, in words for the whole vocabulary."""

LOGPROB_FLOOR = -9999.0
"""Stands for minus infinity, which JSON lacks (vLLM's value)."""
NOT_FINITE = "the model's logits are not finite"
NOTHING_LEFT = "no token is left to sample: every logit is minus infinity"
_GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: logits divided by them would overflow (vLLM's _SAMPLING_EPS)."""


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """The next token of one sequence, or the reason why there is none."""

    token_id: int
    """-1 where `error` is set; otherwise below the vocabulary size and never a suppressed id."""
    logprob: TokenLogprob | None = None
    """Where the sequence asked for logprobs."""
    error: str | None = None
    """Why this row could not be sampled. Other rows of the batch are unaffected."""
    completes: bool = False
    """Whether nothing can follow it in the sequence's grammar."""


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is taken, so that no random number is needed."""
    return params.temperature < _GREEDY_BELOW or params.top_k == 1
