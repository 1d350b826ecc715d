"""How long a request may take."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from server.errors import DeadlineError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds from a request's arrival; None: as long as it takes."""

    first_token: float | None = None
    end: float | None = None

    def __bool__(self) -> bool:
        return self.first_token is not None or self.end is not None


NO_DEADLINES = Deadlines()


async def within(
    deadlines: Deadlines, arrival: float, items: AsyncGenerator[Item, None]
) -> AsyncGenerator[Item, None]:
    """`items`, which are closed with this. Raises DeadlineError where the next one does not come in time.

    arrival: `time.monotonic()` seconds.
    """
    limit = min(_seconds(deadlines.first_token), _seconds(deadlines.end))
    async with aclosing(items):
        while True:
            left = arrival + limit - time.monotonic()
            if left <= 0:  # before anything is asked for
                raise _late(limit, deadlines)
            try:
                async with asyncio.timeout(None if math.isinf(left) else left):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _late(limit, deadlines) from None
            limit = _seconds(deadlines.end)
            yield item


def _seconds(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _late(limit: float, deadlines: Deadlines) -> DeadlineError:
    what = "complete" if limit == deadlines.end else "begun"
    return DeadlineError(f"The answer was not {what} within {limit:g} seconds.")
