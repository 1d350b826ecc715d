"""How many lines of batches run at once: many while nobody else uses the server, one while somebody does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

POLL_SECONDS = 0.05


class Slots:
    """Laws:

    1. Whoever asks first is served first, so that batches of several owners take turns.
    2. At most `limit` are taken, and none beyond the first is given away unless `is_idle()`. The first is, so
       that batches proceed under any load.
    """

    def __init__(self, limit: int, is_idle: Callable[[], bool]) -> None:
        self._limit = limit
        self._is_idle = is_idle
        self._num_taken = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self) -> None:
        async with self._turn:
            while self._num_taken >= (self._limit if self._is_idle() else 1):
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._freed.wait()
            self._num_taken += 1

    def give_back(self) -> None:
        self._num_taken -= 1
        self._freed.set()
