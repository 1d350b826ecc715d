"""Asks until there is an answer: a line of a batch can wait, where a client would be told to come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from server.batches.lines import Answer

MAX_LOST = 3
"""Engines that may end while they compute a line; after that many it counts as failed."""


async def final_answer(ask: Callable[[], Awaitable[Answer]], pause: float) -> Answer:
    """What `ask` gives once the server has room and an engine. It is asked again after `pause` seconds."""
    num_lost = 0
    while True:
        answer = await ask()
        if answer.status not in (429, 503):
            return answer
        num_lost += _bodies.decode(answer.body).error.code == "engine_lost"
        if num_lost == MAX_LOST:
            return answer
        await asyncio.sleep(pause)


class _Error(msgspec.Struct):
    code: str | None = None


class _Body(msgspec.Struct):
    error: _Error


_bodies = msgspec.json.Decoder(_Body)
