"""Who comes before whom: by `priority`, of one priority by tenants' fair shares, of one tenant by arrival.

Within a priority this is start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", 1996). A
sequence that enters gets a start tag: where its tenant's sequences so far leave off, but not before the clock,
which stands at the highest start tag that was admitted. Its cost, in tokens, sets where the tenant leaves off
next. So a tenant that asked for little comes right after what was admitted last, however much of others' waits.

Laws:
1. The order of two sequences never changes while they live, preemptions included.
2. Of one tenant and priority, a later arrival never overtakes an earlier one. With one tenant, this is all.
3. Whoever is asked to give way comes after somebody who may stay: the first of all never is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from typing import NamedTuple

from server.engine.sequence import Sequence

FIRST_GUESS = 256
"""Tokens that a tenant's outputs are taken to have before any has ended, `max_tokens` allowing. That bound
alone would be a bad guess: most chats name none, and it is then all that the context has room for."""
GUESS_WEIGHT = 1 / 8
"""Of the last output in the next guess."""


class Rank(NamedTuple):
    priority: int
    start: int
    """The start tag."""
    arrival: int


class Precedence:
    """The order of the sequences that have entered and not left, in which lists of them are kept."""

    def __init__(self) -> None:
        self._ranks: dict[Sequence, Rank] = {}
        self._arrivals = itertools.count()
        self._classes: dict[int, _Class] = {}
        """By priority, those that live: clients choose the numbers."""
        self._guesses: dict[str, float] = {}
        """By tenant, the tokens of an output."""

    def enter(self, seq: Sequence) -> None:
        priority, tenant = seq.request.priority, seq.request.tenant
        output = min(seq.params.max_tokens, self._guesses.get(tenant, FIRST_GUESS))
        cost = seq.num_prompt_tokens + max(1, int(output))
        start = self._classes.setdefault(priority, _Class()).enter(seq, cost)
        self._ranks[seq] = Rank(priority, start, next(self._arrivals))

    def admit(self, seq: Sequence) -> None:
        """It begins to run, for the first time or again."""
        rank = self._ranks[seq]
        self._classes[rank.priority].admit(seq, rank.start)

    def leave(self, seq: Sequence) -> None:
        rank = self._ranks.pop(seq)
        if self._classes[rank.priority].leave(seq):
            del self._classes[rank.priority]
        if seq.num_generated:
            guess = self._guesses.get(seq.request.tenant, FIRST_GUESS)
            self._guesses[seq.request.tenant] = guess + (seq.num_generated - guess) * GUESS_WEIGHT

    def insert(self, seq: Sequence, ordered: list[Sequence]) -> None:
        """Put `seq` in its place."""
        insort(ordered, seq, key=self._ranks.__getitem__)

    def victim(self, running: list[Sequence]) -> Sequence | None:
        """The one of an ordered list that should give up its memory; None if it has only one.

        One of the later half of the lowest class; of that half, the one with the fewest computed tokens costs
        least to compute again.
        """
        if len(running) < 2:
            return None
        priority = running[-1].request.priority
        first = bisect_left(running, priority, key=lambda seq: seq.request.priority)
        num_equals = len(running) - first
        # Of an odd number the middle one belongs to the later half, unless it may be the first of all.
        num_spared = (num_equals + 1) // 2 if first == 0 else num_equals // 2
        return min(reversed(running[first + num_spared :]), key=lambda seq: seq.num_computed)


class _Class:
    """The sequences of one priority."""

    def __init__(self) -> None:
        self._clock = 0
        """The highest start tag that was admitted."""
        self._shares: dict[str, _Share] = {}
        self._num_sequences = 0

    def enter(self, seq: Sequence, cost: int) -> int:
        """The start tag."""
        self._num_sequences += 1
        share = self._shares.setdefault(seq.request.tenant, _Share())
        start = max(self._clock, share.end())
        share.ends[seq] = start + cost
        return start

    def admit(self, seq: Sequence, start: int) -> None:
        self._clock = max(self._clock, start)
        share = self._shares[seq.request.tenant]
        share.admitted = max(share.admitted, share.ends[seq])

    def leave(self, seq: Sequence) -> bool:
        """Whether nobody is left, so that nothing is to be remembered."""
        self._num_sequences -= 1
        del self._shares[seq.request.tenant].ends[seq]
        return self._num_sequences == 0


class _Share:
    """What one tenant has asked for. Whoever leaves before it was admitted has cost nothing."""

    def __init__(self) -> None:
        self.ends: dict[Sequence, int] = {}
        """Start tag plus cost of those that live; by arrival, and so the last is the highest."""
        self.admitted = 0
        """The highest of those that were admitted."""

    def end(self) -> int:
        return max(next(reversed(self.ends.values()), 0), self.admitted)
