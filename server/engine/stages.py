"""How long the stages of a start take."""

from __future__ import annotations

import time
from collections.abc import Callable


class StageTimes:
    """Seconds by stage, one after another; a stage that comes again goes on. One thread at a time."""

    def __init__(self, first: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = first
        self._entered = clock()
        self._seconds: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """Ends the stage before, unless it is the same."""
        if stage != self._stage:
            self._add()
            self._stage = stage

    def seconds(self) -> dict[str, float]:
        """Of each stage until now, in order of their first beginnings."""
        self._add()
        return dict(self._seconds)

    def _add(self) -> None:
        now = self._clock()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._entered
        self._entered = now
