"""How long the event loop stands still: what a probe waits while something else is asked for, and how much of
the processor's time one of the loop's callbacks takes, which does not depend on what else the machine does."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from types import TracebackType
from typing import Self

import httpx
import pytest

POLL_SECONDS = 0.01


class LoopProbe:
    """Asks for /livez all the time, in a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._probe)
        self.seconds: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        while len(self.seconds) < 5:
            time.sleep(POLL_SECONDS)
        self.seconds.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while len(self.seconds) < 5 and self._thread.is_alive():
            time.sleep(POLL_SECONDS)
        self._over.set()
        self._thread.join()

    @property
    def worst(self) -> float:
        return max(self.seconds)

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[math.ceil(0.99 * len(self.seconds)) - 1]

    def _probe(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                started = time.monotonic()
                assert client.get("/livez").status_code == 200
                self.seconds.append(time.monotonic() - started)
                time.sleep(POLL_SECONDS)


class LoopMeter:
    """Measures the callbacks of all event loops of this process, which so far are in other threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worst = 0.0
        """Seconds of processor time that the longest callback took."""
        run = asyncio.Handle._run  # type: ignore[attr-defined]

        def measured(handle: asyncio.Handle) -> None:
            started = time.thread_time()
            run(handle)
            self.worst = max(self.worst, time.thread_time() - started)

        monkeypatch.setattr(asyncio.Handle, "_run", measured)
