"""Which tokens each row of a batch may sample: grammars, allowed_token_ids and bad_words, as one mask.

Laws:
1. Rows of sequences that ask for none of these cost nothing.
2. A mask is a function of the sequence and, behind a draft, of the draft.
3. A grammar that cannot go on ends its own sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

import numpy as np
from msgspec import structs

from server.engine.batch import ScheduledSequence
from server.engine.grammar.state import GrammarState, set_token
from server.engine.sampling.types import SampledToken, TokenMask
from server.engine.sequence import Sequence
from server.grammar_library import GrammarError

_ALL = 0xFFFFFFFF
_GRAMMAR_FAULT = "its grammar's matcher cannot go on"
"""For the log, which the library's own words are kept out of: they may quote the grammar or the text."""


class TokenConstraints:
    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._constraints: WeakKeyDictionary[Sequence, _Constraint] = WeakKeyDictionary()

    def masks(self, scheduled: Seq[ScheduledSequence]) -> dict[int, TokenMask]:
        """By row of the batch that samples, for those that must not sample every token."""
        masks: dict[int, TokenMask] = {}
        row = 0
        for item in scheduled:
            if item.samples and _is_constrained(item.seq):
                masks.update(enumerate(self._of(item.seq).masks(item.seq, item.draft), start=row))
            row += item.num_sampled
        return masks

    def take(self, scheduled: Seq[ScheduledSequence], sampled: list[SampledToken]) -> list[SampledToken]:
        """What was sampled, with the end of each grammar and its errors noted; moves grammars over the tokens
        that the scheduler will take."""
        sampled = list(sampled)
        row = 0
        for item in scheduled:
            if item.samples and item.seq.compiled_grammar is not None:
                last = row + item.num_sampled
                sampled[row:last] = self._of(item.seq).take(sampled[row:last], item.draft)
            row += item.num_sampled
        return sampled

    def _of(self, seq: Sequence) -> _Constraint:
        constraint = self._constraints.get(seq)
        if constraint is None:
            constraint = self._constraints[seq] = _Constraint(seq, self._num_words)
        return constraint


def _is_constrained(seq: Sequence) -> bool:
    params = seq.params
    return seq.compiled_grammar is not None or bool(params.allowed_token_ids or params.bad_words)


class _Constraint:
    """Of one sequence."""

    def __init__(self, seq: Sequence, num_words: int) -> None:
        self._num_words = num_words
        self._bad_words = seq.params.bad_words
        self._allowed: TokenMask | None = None
        if seq.params.allowed_token_ids:
            bits = np.zeros(num_words * 32, dtype=bool)
            bits[np.array(seq.params.allowed_token_ids)] = True
            self._allowed = np.packbits(bits, bitorder="little").view(np.uint32)
        self._grammar: GrammarState | None = None
        if seq.compiled_grammar is not None:
            self._grammar = GrammarState(seq.compiled_grammar, seq.params.stop_token_ids)
        self._fault: str | None = None

    def masks(self, seq: Sequence, draft: tuple[int, ...]) -> list[TokenMask]:
        """For the sequence's next token and those behind each of the draft's, as far as they can count."""
        table = np.full((1 + len(draft), self._num_words), _ALL, dtype=np.uint32)
        rows = list(table)
        if self._grammar is not None and self._fault is None:
            try:
                rows = rows[: self._grammar.fill_masks(draft, rows)]
            except GrammarError:
                self._fault = _GRAMMAR_FAULT
        if self._allowed is not None:
            table &= self._allowed
        if self._bad_words:
            longest = max(map(len, self._bad_words))
            newest = seq.token_ids[max(seq.num_prompt_tokens, seq.num_tokens - longest) :]
            for count, row in enumerate(rows):
                self._forbid_bad_words(row, [*newest, *draft[:count]])
        return rows

    def take(self, sampled: list[SampledToken], draft: tuple[int, ...]) -> list[SampledToken]:
        """See `TokenConstraints.take`."""
        assert self._grammar is not None
        if self._fault is not None:
            return [SampledToken(-1, error=self._fault)] * len(sampled)
        for index, token in enumerate(sampled):
            if token.error is not None:
                break
            try:
                completes = self._grammar.move_over(token.token_id)
            except GrammarError:
                self._fault = _GRAMMAR_FAULT
                sampled[index] = SampledToken(-1, error=_GRAMMAR_FAULT)
                break
            if completes:
                sampled[index] = structs.replace(token, completes=True)
            if completes or draft[index : index + 1] != (token.token_id,):
                break
        return sampled

    def _forbid_bad_words(self, row: TokenMask, newest: list[int]) -> None:
        for *before, last in self._bad_words:
            if not before or newest[-len(before) :] == before:
                set_token(row, last, allowed=False)
