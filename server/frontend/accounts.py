"""What each tenant may have in flight, ask for and use in a minute.

Laws:
1. `in_flight` is the number of sequences whose charges are not settled, and never exceeds the limit.
2. A charge takes a request's most tokens from the minute's when it is made, and is settled exactly once, for
   what was used. The minute's tokens can go below nothing by that, and then fill up again first.
3. An account outlives changes of its limits, and what is in flight through them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.api_keys import Limits, Tenant
from server.errors import InvalidRequestError, RateLimitError
from server.frontend.release_rate import ReleaseRate

SECONDS = 60.0
"""In the minute of the limits."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Where one of the limits for a minute stands."""

    limit: int
    remaining: int
    reset_seconds: float
    """Until all of it is there again, if nobody asks for anything."""


class TokenBucket:
    """Fills at an even rate, `per_minute` in a minute, and holds as much."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._capacity = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled_at = clock()

    def seconds_until(self, count: int) -> float:
        """How long until `count` can be taken; 0: now. More than it holds can be taken when it is full."""
        self._fill()
        return max(0.0, (min(count, self._capacity) - self._level) * SECONDS / self._capacity)

    def take(self, count: int) -> int:
        """How much was taken: at most what it holds when it is full."""
        count = min(count, self._capacity)
        self._level -= count
        return count

    def give_back(self, count: int) -> None:
        """`count` may be negative: more was used than was taken."""
        self._fill()
        self._level = min(float(self._capacity), self._level + count)

    def quota(self) -> Quota:
        self._fill()
        missing = self._capacity - self._level
        # Half a millionth, lest a request that is due be lost to rounding.
        return Quota(self._capacity, max(0, math.floor(self._level + 5e-7)), missing * SECONDS / self._capacity)

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * self._capacity / SECONDS
        self._level = min(float(self._capacity), self._level + gained)
        self._filled_at = now


class Charge:
    """What a request holds of its tenant's limits."""

    def __init__(
        self, account: Account, num_sequences: int, tokens: TokenBucket | None, num_tokens: int
    ) -> None:
        """`num_tokens` were taken from `tokens`, which the account may have replaced by another meanwhile."""
        self._account = account
        self._num_sequences = num_sequences
        self._tokens = tokens
        self._num_tokens = num_tokens

    def settle(self, num_used: int) -> None:
        """All is over, and took `num_used` tokens. Again does no harm."""
        if self._num_sequences:
            self._account._settle(self._num_sequences)
            if self._tokens is not None:
                self._tokens.give_back(self._num_tokens - num_used)
        self._num_sequences = 0


class Account:
    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._returns = ReleaseRate(clock)
        self.in_flight = 0
        self.apply(limits)

    def apply(self, limits: Limits) -> None:
        """Go on with these limits, and a full minute's worth of them."""
        self.limits = limits
        per_minute = limits.requests_per_minute, limits.tokens_per_minute
        self._requests, self._tokens = (
            None if count is None else TokenBucket(count, self._clock) for count in per_minute
        )

    def take_request(self) -> None:
        """Count a request, before it costs anything. Raises RateLimitError, also for what will find no room."""
        self._check_sequences(1)
        if self._tokens is not None:
            self._check_minute(self._tokens, 1, "tokens")
        if self._requests is not None:
            self._check_minute(self._requests, 1, "requests")
            self._requests.take(1)

    def charge(self, num_sequences: int, num_tokens: int) -> Charge:
        """Take room for sequences, and the most tokens that they can use. Raises RateLimitError, and
        InvalidRequestError for what there can never be room for."""
        most = self.limits.max_sequences
        if most is not None and num_sequences > most:
            raise InvalidRequestError(
                f"A request of this client may ask for at most {most} sequences (prompts times 'n'), got "
                f"{num_sequences}.",
                param="n",
            )
        self._check_sequences(num_sequences)
        if self._tokens is not None:
            self._check_minute(self._tokens, num_tokens, "tokens")
            num_tokens = self._tokens.take(num_tokens)
        if self.in_flight == 0:
            self._returns.begin()
        self.in_flight += num_sequences
        return Charge(self, num_sequences, self._tokens, num_tokens)

    @property
    def requests(self) -> Quota | None:
        return None if self._requests is None else self._requests.quota()

    @property
    def tokens(self) -> Quota | None:
        return None if self._tokens is None else self._tokens.quota()

    def _check_sequences(self, count: int) -> None:
        most = self.limits.max_sequences
        if most is not None and self.in_flight + count > most:
            raise RateLimitError(
                f"{self.in_flight} sequences of this client wait or run, of at most {most}.",
                retry_after=self._returns.seconds_for(self.in_flight + count - most),
            )

    def _check_minute(self, bucket: TokenBucket, count: int, what: str) -> None:
        seconds = bucket.seconds_until(count)
        if seconds > 1e-6:
            limit = bucket.quota().limit
            raise RateLimitError(
                f"This client may use {limit} {what} in a minute; there is room for {count} more in "
                f"{seconds:.1f} seconds.",
                retry_after=math.ceil(seconds),
            )

    def _settle(self, num_sequences: int) -> None:
        self.in_flight -= num_sequences
        self._returns.add(num_sequences)


class Accounts:
    """One for each tenant that ever asked for anything: as many as there were keys."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def of(self, tenant: Tenant) -> Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            account = self._accounts[tenant.id] = Account(tenant.limits)
        elif account.limits != tenant.limits:  # the file of keys was read again
            account.apply(tenant.limits)
        return account
