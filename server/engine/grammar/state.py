"""Where one sequence is in its grammar, and which tokens may come next there and behind each guess.

Laws:
1. Between calls the state is that of the generated tokens it was moved over, and nothing else: preemption does
   not touch it, and a guess leaves no trace.
2. A stop token can come exactly where the text may end, whatever its own text is, and no token else stands for
   the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.sampling.types import TokenMask
from server.grammar_library import GrammarError, Matcher


class GrammarState:
    def __init__(self, compiled: Matcher, stop_token_ids: Sequence[int]) -> None:
        """`compiled` is copied."""
        self._compiled = compiled
        self._matcher = compiled.copy()
        self._stop_token_ids = frozenset(stop_token_ids)
        self._generated: list[int] = []

    def move_over(self, token_id: int) -> bool:
        """Take in the next generated token. Returns whether nothing can follow it. Raises GrammarError."""
        if token_id in self._stop_token_ids:
            return False  # the sequence ends with it
        self._matcher.consume((token_id,))
        self._generated.append(token_id)
        return self._matcher.is_complete

    def fill_masks(self, draft: Sequence[int], rows: Sequence[TokenMask]) -> int:
        """Fill a row for the next token, and one for the token behind each of the draft's, while they match.

        Returns how many rows are filled; what is sampled in the others counts for nothing, since what is before
        them does not match. Raises GrammarError.
        """
        self._fill(rows[0])
        num_moved, num_filled = 0, 1
        try:
            for token_id, row in zip(draft, rows[1:], strict=True):
                if token_id in self._stop_token_ids or not self._matcher.num_matching((token_id,)):
                    break
                self._matcher.consume((token_id,))
                num_moved += 1
                if self._matcher.is_complete:
                    break
                self._fill(row)
                num_filled += 1
            if num_moved:
                self._matcher.rollback(num_moved)
        except GrammarError:
            # The guess went beyond a limit, or the grammar counts tokens and cannot go back.
            self._matcher = self._compiled.copy()
            self._matcher.consume(self._generated)
        return num_filled

    def _fill(self, row: TokenMask) -> None:
        self._matcher.fill_mask(row.ctypes.data, row.nbytes)
        set_token(row, self._matcher.eos_token_id, allowed=False)
        if self._stop_token_ids:
            may_end = self._matcher.is_accepting
            for token_id in self._stop_token_ids:
                set_token(row, token_id, allowed=may_end)


def set_token(mask: TokenMask, token_id: int, *, allowed: bool) -> None:
    """An id beyond the mask is none."""
    word, bit = divmod(token_id, 32)
    if word < len(mask):
        if allowed:
            mask[word] |= 1 << bit
        else:
            mask[word] &= ~(1 << bit) & 0xFFFFFFFF
