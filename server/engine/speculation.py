"""Guesses what a sequence goes on with from what it has said before, so that a step can check several tokens.

The guess is what followed the last occurrence of its newest tokens: Saxena, "Prompt Lookup Decoding", 2023. It
is right where text is copied, edited or repeated. Laws:

1. A guess costs time and nothing else: each token is sampled as it would have been without.
2. A sequence's n-grams are noted once, as its tokens come: a guess takes no search through the context.
3. Each sequence earns its guesses. They begin with one token, grow while they are right, and become
   exponentially rare while they are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.sequence import Sequence

_NGRAM_SIZES = (3, 2)
"""So many of the newest tokens are looked up, the first that has occurred before."""
_MOST_MISSES = 6
"""That count: after them a sequence waits 2 ** _MOST_MISSES tokens for its next guess."""


@dataclass(slots=True)
class _History:
    """Of one sequence."""

    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Position after the last occurrence of each n-gram, without those that nothing has followed yet."""
    num_indexed: int = 1
    """Positions from here on have yet to become followers."""
    length: int = 1
    """Tokens of the next guess."""
    misses: int = 0
    """Guesses in a row of which nothing was right."""
    resume_at: int = 0
    """No guess below so many tokens."""


class NgramSpeculator:
    """Knows the sequences that it was asked about until they are forgotten."""

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: of all guesses in one step; 0: no guesses."""
        self.max_tokens = max_tokens
        self._histories: dict[Sequence, _History] = {}

    def propose(self, seq: Sequence, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may come next; none where nothing is known."""
        history = self._histories.setdefault(seq, _History())
        if limit < 1 or seq.num_tokens < history.resume_at:
            return ()
        limit = min(limit, history.length)
        self._index(history, seq.token_ids)
        for size in _NGRAM_SIZES:
            follower = history.followers.get(tuple(seq.token_ids[-size:]))
            if follower is not None:
                known = seq.token_ids[follower : follower + limit]
                # An occurrence that overlaps the newest tokens is a loop: it goes round.
                return tuple(known[i % len(known)] for i in range(limit))
        return ()

    def record(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Take in how many tokens of the last guess were right; `seq` has them already."""
        history = self._histories[seq]
        if num_accepted == 0:
            history.length = 1
            history.misses = min(history.misses + 1, _MOST_MISSES)
            history.resume_at = seq.num_tokens + 2**history.misses
        else:
            history.length = 2 * num_drafted if num_accepted == num_drafted else num_accepted + 1
            history.misses = 0

    def forget(self, seq: Sequence) -> None:
        self._histories.pop(seq, None)

    def _index(self, history: _History, token_ids: list[int]) -> None:
        for position in range(history.num_indexed, len(token_ids)):
            for size in _NGRAM_SIZES:
                if position >= size:
                    history.followers[tuple(token_ids[position - size : position])] = position
        history.num_indexed = len(token_ids)
