"""What the sampler hands to the scheduler. Free of torch, so that the scheduler may import it."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one sequence, or the reason why there is none."""

    token_id: int
    """-1 where `error` is set; otherwise below the vocabulary size and never a suppressed id."""
    logprob: TokenLogprob | None = None
    """Where the sequence asked for logprobs."""
    error: str | None = None
    """Why this row could not be sampled. Other rows of the batch are unaffected."""
