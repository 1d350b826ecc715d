"""How long a request may take."""

from __future__ import annotations

import asyncio
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


async def within(
    deadlines: Deadlines, arrival: float, items: AsyncGenerator[Item, None]
) -> AsyncGenerator[Item, None]:
    """`items`, which are closed with this. Raises DeadlineError where the next one does not come in time.

    arrival: `time.monotonic()` seconds.
    """
    given = [seconds for seconds in (deadlines.first_token, deadlines.end) if seconds is not None]
    limit = min(given, default=None)
    async with aclosing(items):
        while True:
            left = None if limit is None else arrival + limit - time.monotonic()
            if left is not None and left <= 0:  # before anything is asked for
                raise _late(limit, deadlines)
            try:
                async with asyncio.timeout(left):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _late(limit, deadlines) from None
            limit = deadlines.end
            yield item


def _late(limit: float | None, deadlines: Deadlines) -> DeadlineError:
    what = "complete" if limit == deadlines.end else "begun"
    return DeadlineError(f"The answer was not {what} within {limit:g} seconds.")
