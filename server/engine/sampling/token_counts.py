"""How often a sequence has each of its tokens, kept from step to step, so that a context is counted once."""

from __future__ import annotations

from array import array

from server.engine.sequence import Sequence


class TokenCounts:
    """The distinct tokens below `vocab_size` of one sequence and how often it generated each.

    Nothing but a cache of `Sequence.token_ids`, which only ever grows.
    """

    def __init__(self, seq: Sequence, vocab_size: int, with_prompt: bool) -> None:
        """with_prompt: list the prompt's tokens, too; their counts are 0 until they are generated."""
        prompt = dict.fromkeys(seq.token_ids[: seq.num_prompt_tokens] if with_prompt else ())
        self.ids = array("i", [token for token in prompt if token < vocab_size])
        self.counts = array("i", [0]) * len(self.ids)
        self._vocab_size = vocab_size
        self._index = {token: index for index, token in enumerate(self.ids)}
        self._num_counted = seq.num_prompt_tokens

    def update(self, seq: Sequence) -> None:
        """Counts what was generated since the last call."""
        for token in seq.token_ids[self._num_counted :]:
            index = self._index.get(token)
            if index is not None:
                self.counts[index] += 1
            elif token < self._vocab_size:
                self._index[token] = len(self.ids)
                self.ids.append(token)
                self.counts.append(1)
        self._num_counted = seq.num_tokens
