"""How fast something in use is given back, as an answer to "when will there be room"."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

MEMORY_SECONDS = 10.0
"""What was given back so long ago counts for 1/e."""
MOST_SECONDS = 60
"""Nobody is told to come back later than that."""


class ReleaseRate:
    """Counts what is given back while anything is in use. Times in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent = 0.0
        self._busy_since = self._counted_at = clock()

    def begin(self) -> None:
        """From here on something is in use, after nothing was: the idle time tells nothing."""
        self._recent = 0.0
        self._busy_since = self._counted_at = self._clock()

    def add(self, count: float) -> None:
        """So much was given back now."""
        self._decay()
        self._recent += count

    def seconds_for(self, count: float) -> int:
        """How long it will take until `count` more is given back: 1 to MOST_SECONDS."""
        self._decay()
        # Where nothing came back so far, as long again is as good a guess as any.
        seconds = busy = self._counted_at - self._busy_since
        if self._recent > 0:
            seen = MEMORY_SECONDS * -math.expm1(-busy / MEMORY_SECONDS)
            seconds = count * seen / self._recent
        return max(1, min(MOST_SECONDS, math.ceil(seconds)))

    def _decay(self) -> None:
        now = self._clock()
        self._recent *= math.exp((self._counted_at - now) / MEMORY_SECONDS)
        self._counted_at = now
