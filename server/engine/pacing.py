"""How many prompt tokens a step takes beside running streams.

Streams get their next tokens when a step ends, so each prompt token in it makes all of them wait. The pacer
learns from the steps what that costs, and bounds a step with prompts to `stretch` times one without.
"""

from __future__ import annotations

_WEIGHT_OF_NEWEST = 0.25
_MIN_TOKENS = 16
"""So that a prompt gets on, and the weights are not read for a handful of its tokens."""


class PrefillPacer:
    def __init__(self, stretch: float, max_tokens: int) -> None:
        """max_tokens: the answer as long as nothing is known."""
        self._stretch = stretch
        self._max_tokens = max_tokens
        self._stream_step: float | None = None
        """Seconds of a step of streams alone; moving averages, both."""
        self._stream_token = 0.0
        """Seconds of such a step for each stream."""
        self._prefill_token: float | None = None
        """Seconds that a prompt token adds to a step."""

    def max_prefill_tokens(self) -> int:
        """Prompt tokens for a step that also has streams."""
        if self._stream_step is None:
            return self._max_tokens
        # Until one has been measured: it cannot cost more than a stream's, which also reads the weights.
        token = self._stream_token if self._prefill_token is None else self._prefill_token
        room = (self._stretch - 1.0) * self._stream_step
        return max(_MIN_TOKENS, min(self._max_tokens, int(room / max(token, 1e-9))))

    def record(self, num_streams: int, num_prefill_tokens: int, seconds: float) -> None:
        """Take in how long a step took. Steps of prompts alone tell nothing new: they are not bounded."""
        if num_streams == 0:
            return
        if num_prefill_tokens == 0:
            self._stream_step = _average(self._stream_step, seconds)
            self._stream_token = seconds / num_streams
        elif self._stream_step is not None:
            added = max(0.0, seconds - self._stream_step) / num_prefill_tokens
            self._prefill_token = _average(self._prefill_token, added)


def _average(average: float | None, newest: float) -> float:
    return newest if average is None else average + _WEIGHT_OF_NEWEST * (newest - average)
