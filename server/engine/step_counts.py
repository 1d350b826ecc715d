"""What the scheduler counts for the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounts:
    """What happened since the counts were last taken."""

    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens of newly admitted sequences that may use the prefix cache."""
    prefix_cache_hits: int = 0
    """Those of them that were found there."""
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Tokens of drafts that turned out right."""
