"""Tokens whose text says in which step they were emitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.words import COMMON_WORDS
from server.tokenizer import Tokenizer

NUM_WORDS = 200
"""A word comes back after so many steps: longer than any delay that is worth telling apart."""


@dataclass(frozen=True, slots=True)
class Words:
    """Words that are a token each, in the order in which steps emit them."""

    words: tuple[str, ...]
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words:
        """Raises ValueError if the tokenizer keeps too few words whole."""
        encoded = {word: tokenizer.encode_text(f" {word}") for word in dict.fromkeys(COMMON_WORDS)}
        whole = [(word, ids[0]) for word, ids in encoded.items() if len(ids) == 1][:NUM_WORDS]
        if len(whole) < NUM_WORDS:
            raise ValueError(f"only {len(whole)} of the common words are a token")
        return cls(*zip(*whole, strict=True))


def delays_of(
    numbers: npt.NDArray[np.int64], arrivals: npt.NDArray[np.float64], emitted: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Seconds from the emission of each token to its arrival.

    numbers: [n] steps modulo NUM_WORDS; arrivals: [n]; emitted: [steps] when each was. A token is of the last
    step with its number that lies before its arrival.
    """
    newest = np.searchsorted(emitted, arrivals, side="right") - 1
    return arrivals - emitted[newest - (newest - numbers) % NUM_WORDS]
