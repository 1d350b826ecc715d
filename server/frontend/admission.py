"""How much may be in flight: a bound on sequences, and one on prompts that wait to be computed.

Laws:
1. `in_flight` is the number of sequences whose permits are held, and never exceeds `max_sequences`.
2. `queued_tokens` is the number of tokens of the prompts of those permits that were not told to be computed. It
   exceeds `max_queued_tokens` only for a request that found nobody waiting, which no wait would help.
3. A permit is given back exactly once, whatever ends its request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from server.errors import InvalidRequestError, QueueFullError
from server.frontend.release_rate import ReleaseRate

GREED = 8
"""So many times as much as is free a tenant may hold where there are others: alone it gets 8/9 of the queue,
and whoever comes next finds room (the dynamic thresholds of Choudhury and Hahne, 1998)."""


class Permit:
    """Room for a request. Release it when all of its sequences are over; again does no harm."""

    def __init__(self, admission: Admission, num_sequences: int, num_tokens: int) -> None:
        self._admission = admission
        self._num_sequences = num_sequences
        self._num_tokens = num_tokens

    def computed(self, num_tokens: int) -> None:
        """So many tokens of its prompts wait no longer."""
        num_tokens = min(num_tokens, self._num_tokens)
        self._num_tokens -= num_tokens
        self._admission._forget_tokens(num_tokens)

    def release(self) -> None:
        self.computed(self._num_tokens)
        self._admission._forget_sequences(self._num_sequences)
        self._num_sequences = 0


class Admission:
    def __init__(
        self,
        max_sequences: int,
        max_queued_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_sequences = max_sequences
        self.max_queued_tokens = math.inf if max_queued_tokens is None else max_queued_tokens
        self.in_flight = 0
        self.queued_tokens = 0
        self.released_at = -math.inf
        """`time.monotonic()` seconds at which a permit was last given back."""
        self._clock = clock
        self._sequences = ReleaseRate(clock)
        self._tokens = ReleaseRate(clock)

    def check_room(self, held: int = 0) -> None:
        """Refuse what will find no room, before it costs something. `held` as for `acquire`.

        Raises QueueFullError.
        """
        self._check(1, 1, held)

    def check_count(self, count: int) -> None:
        """Refuse more sequences than could ever be admitted. Raises InvalidRequestError."""
        if count > self.max_sequences:
            raise InvalidRequestError(
                f"A request may ask for at most {self.max_sequences} sequences (prompts times 'n'), got "
                f"{count}.",
                param="n",
            )

    def acquire(self, count: int, num_tokens: int, held: int = 0) -> Permit:
        """Room for `count` sequences with prompts of `num_tokens` in all, now or not at all.

        held: sequences that the tenant has in flight already; 0 where there is no other.

        Raises QueueFullError, and InvalidRequestError as `check_count` does.
        """
        self.check_count(count)
        self._check(count, num_tokens, held)
        if self.in_flight == 0:
            self._sequences.begin()
        if self.queued_tokens == 0:
            self._tokens.begin()
        self.in_flight += count
        self.queued_tokens += num_tokens
        return Permit(self, count, num_tokens)

    def _check(self, count: int, num_tokens: int, held: int) -> None:
        excess = self.in_flight + count - self.max_sequences
        if excess > 0:
            raise QueueFullError(
                f"The server is full: {self.in_flight} of at most {self.max_sequences} sequences wait or run.",
                retry_after=self._sequences.seconds_for(excess),
            )
        if held > GREED * -excess:
            raise QueueFullError(
                f"The server is nearly full, and {held} sequences of this client wait or run: what is left is "
                "for others.",
                retry_after=self._sequences.seconds_for(count),
            )
        excess_tokens = self.queued_tokens + num_tokens - self.max_queued_tokens
        if excess_tokens > 0 and self.queued_tokens:
            raise QueueFullError(
                f"The server is full: prompts of {self.queued_tokens} tokens wait, of at most "
                f"{self.max_queued_tokens}.",
                retry_after=self._tokens.seconds_for(min(excess_tokens, self.queued_tokens)),
            )

    def _forget_sequences(self, count: int) -> None:
        self.in_flight -= count
        if count:
            self.released_at = self._clock()
            self._sequences.add(count)

    def _forget_tokens(self, count: int) -> None:
        self.queued_tokens -= count
        if count:
            self._tokens.add(count)
