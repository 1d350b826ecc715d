"""What a request came to: its counts so far, for `usage`, and how it went, for its trace."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class UsageCounts:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """How one sequence went. Times are `time.monotonic()` seconds; 0 for what did not happen."""

    params: SamplingParams
    finish_reason: FinishReason
    scheduled_at: float
    first_token_at: float
    ended_at: float
    """The last token's time where it ended by itself."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """How one request went."""

    request_id: str
    """As the client knows it."""
    arrival: float
    usage: UsageCounts
    sequences: list[SequenceRecord]
