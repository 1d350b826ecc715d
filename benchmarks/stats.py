"""Figures from finished requests: percentiles, and what they are taken of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the client saw it. Times are `time.perf_counter()` seconds."""

    sent_at: float
    finished_at: float
    chunk_times: tuple[float, ...] = ()
    """When each chunk with output arrived."""
    chunk_tokens: tuple[int, ...] = ()
    """Output tokens in each of those chunks, >= 1. Tokens that made no text belong to the chunk after them."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds until the first output."""
        return self.chunk_times[0] - self.sent_at if self.chunk_times else None

    @property
    def token_gaps(self) -> list[float]:
        """Seconds between each output token and the one before it.

        A chunk with k tokens that comes d seconds after the last chunk counts as k gaps of d / k: the server
        made the tokens one by one and sent them together. The first chunk's tokens have no gap that a client
        can see.
        """
        gaps: list[float] = []
        for previous, arrived, tokens in zip(
            self.chunk_times, self.chunk_times[1:], self.chunk_tokens[1:], strict=False
        ):
            gaps += [(arrived - previous) / tokens] * tokens
        return gaps

    @property
    def output_speed(self) -> float | None:
        """Output tokens per second after the first chunk."""
        tokens = sum(self.chunk_tokens[1:])
        if not tokens:
            return None
        return tokens / max(self.chunk_times[-1] - self.chunk_times[0], 1e-9)


@dataclass(frozen=True, slots=True)
class Summary:
    """Percentiles and mean of one quantity; all None when nothing was measured."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if not values:
            return cls()
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, p) for p in (50, 90, 99))
        return cls(p50, p90, p99, math.fsum(ordered) / len(ordered))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, interpolated linearly between neighbours (NumPy's default method)."""
    if not ordered:
        raise ValueError("no values")
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def split_tokens(total: int, pieces: Sequence[int]) -> tuple[int, ...]:
    """`total` tokens spread over chunks in proportion to `pieces`, each chunk with at least one.

    For servers that say how many tokens a request had, but not how many a chunk had. Without more chunks than
    tokens, the parts sum to `total`; a server that sends more chunks than tokens gets one token a chunk.
    """
    if not pieces:
        return ()
    spare = total - len(pieces)
    if spare <= 0:
        return (1,) * len(pieces)
    weight = sum(pieces)
    if not weight:
        pieces, weight = [1] * len(pieces), len(pieces)
    bounds = [0]
    running = 0
    for piece in pieces:
        running += piece
        bounds.append(round(spare * running / weight))
    return tuple(1 + high - low for low, high in pairwise(bounds))


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of the load generator found. Times in milliseconds, speeds in tokens per second."""

    requests: int
    errors: int
    first_errors: list[str]
    wall_seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    """Output tokens of all requests over the wall time: the throughput."""
    prompt_tokens_per_second: float
    mean_prompt_tokens: float
    mean_output_tokens: float
    ttft_ms: Summary
    inter_token_ms: Summary
    request_ms: Summary
    request_output_speed: Summary
    """Output tokens per second that one request saw after its first chunk."""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[RequestRecord], wall_seconds: float, settings: dict[str, Any]) -> Report:
        good = [record for record in records if record.error is None]
        bad = [record.error for record in records if record.error is not None]
        output = sum(record.output_tokens for record in good)
        prompt = sum(record.prompt_tokens for record in good)
        wall = max(wall_seconds, 1e-9)
        return cls(
            requests=len(good),
            errors=len(bad),
            first_errors=bad[:3],
            wall_seconds=wall_seconds,
            requests_per_second=len(good) / wall,
            output_tokens_per_second=output / wall,
            prompt_tokens_per_second=prompt / wall,
            mean_prompt_tokens=prompt / len(good) if good else 0.0,
            mean_output_tokens=output / len(good) if good else 0.0,
            ttft_ms=Summary.of([1000 * r.ttft for r in good if r.ttft is not None]),
            inter_token_ms=Summary.of([1000 * gap for r in good for gap in r.token_gaps]),
            request_ms=Summary.of([1000 * (r.finished_at - r.sent_at) for r in good]),
            request_output_speed=Summary.of([r.output_speed for r in good if r.output_speed is not None]),
            settings=settings,
        )
