"""How the engine shows that it lives: a thread that says so while the main one loads, computes or waits.

A process that was stopped, or whose interpreter is stuck, says nothing; one whose step hangs says for how long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.engine.types import HEARTBEAT_SECONDS, Heartbeat


class Pulse:
    """What the engine's loop is at. The loop writes it, the thread of `beat` reads it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around a step, or around taking a message in."""
        self._since = self._clock()
        try:
            yield
        finally:
            self._since = None

    def heartbeat(self) -> Heartbeat:
        since = self._since
        return Heartbeat(0.0 if since is None else self._clock() - since)

    def beat(self, send: Callable[[Heartbeat], None]) -> None:
        """Send one now, and one every HEARTBEAT_SECONDS from a thread, for as long as the process lives."""

        def run() -> None:
            while True:
                send(self.heartbeat())
                time.sleep(HEARTBEAT_SECONDS)

        threading.Thread(target=run, name="heartbeat", daemon=True).start()
