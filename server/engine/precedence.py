"""Who comes before whom: sequences of a lower `priority` first, and of one priority whoever arrived first.

Laws:
1. The order of two sequences never changes while they live, preemptions included.
2. Among equals a later arrival never overtakes an earlier one.
3. Whoever is asked to give way comes after somebody who may stay: the first of all never is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort

from server.engine.sequence import Sequence


class Precedence:
    """The order of the sequences that have entered and not left, in which lists of them are kept."""

    def __init__(self) -> None:
        self._ranks: dict[Sequence, tuple[int, int]] = {}
        self._arrivals = itertools.count()

    def enter(self, seq: Sequence) -> None:
        self._ranks[seq] = (seq.request.priority, next(self._arrivals))

    def leave(self, seq: Sequence) -> None:
        del self._ranks[seq]

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
