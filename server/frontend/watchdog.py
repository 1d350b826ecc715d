"""Tells a hung engine from a busy one, and an engine that fell from one that cannot stand.

Laws:
1. Time is that of a monotonic clock, and counts only while this process was awake: whoever slept does not blame
   another for it.
2. Whatever comes from the engine is a sign of life. How long a step takes is what the engine itself says.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from server.engine.types import FinishReason, FromEngine, Heartbeat, Ready, StepOutput
from server.frontend.client import LossCause

TICK_SECONDS = 0.25
"""How often `tick` is to be called."""
SILENT_SECONDS = 3.0
"""Six heartbeats. A busy engine sends them: its steps run without the interpreter's lock."""
LONGEST_DELAY = 30.0
LASTING_SECONDS = 60.0
"""An engine that was ready for so long, or completed a sequence, ended for a reason of its own."""
_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class Watchdog:
    """Watches one engine."""

    def __init__(
        self,
        silence_timeout: float,
        step_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """In seconds, both."""
        self._silence_timeout = silence_timeout
        self._step_timeout = step_timeout
        self._clock = clock
        self._ticked_at = clock()
        self._silence = 0.0
        self._seconds_in_turn = 0.0

    @property
    def is_silent(self) -> bool:
        return self._silence > SILENT_SECONDS

    def heard(self, message: FromEngine) -> None:
        self._silence = 0.0
        if isinstance(message, Heartbeat):
            self._seconds_in_turn = message.seconds_in_turn

    def tick(self) -> tuple[LossCause, str] | None:
        """Take the time that has passed in. What to end the engine for, if it is to be ended."""
        now = self._clock()
        self._silence += min(now - self._ticked_at, 2 * TICK_SECONDS)
        self._ticked_at = now
        if self._silence > self._silence_timeout:
            return LossCause.SILENT, f"the engine showed no sign of life for {self._silence:.0f} s"
        if self._seconds_in_turn > self._step_timeout:
            return LossCause.STUCK, f"a step of the engine has taken {self._seconds_in_turn:.0f} s so far"
        return None


class Restarts:
    """How long to wait before the next engine, and whether there is a point in one."""

    def __init__(self, most_in_a_row: int, clock: Callable[[], float] = time.monotonic) -> None:
        """most_in_a_row: engines that are replaced, one after another, without having got anything done."""
        self._most_in_a_row = most_in_a_row
        self._clock = clock
        self.num_in_a_row = 0
        self._ready_at: float | None = None

    def heard(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self._ready_at = self._clock()
        if isinstance(message, StepOutput) and any(
            output.finish_reason in _COMPLETE for output in message.outputs
        ):
            self.num_in_a_row = 0

    def ended(self) -> float | None:
        """An engine has ended. Seconds until the next one is to be started; None: give up."""
        if self._ready_at is not None and self._clock() - self._ready_at > LASTING_SECONDS:
            self.num_in_a_row = 0
        self._ready_at = None
        self.num_in_a_row += 1
        if self.num_in_a_row > self._most_in_a_row:
            return None
        return 0.0 if self.num_in_a_row == 1 else min(2.0 ** (self.num_in_a_row - 2), LONGEST_DELAY)
