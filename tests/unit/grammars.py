"""Grammars over a tiny vocabulary, beside all the texts that they have: an oracle that no parser is part of."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass
from functools import cached_property

from server.engine.types import Vocabulary as VocabularyMessage
from server.grammar_library import CONTROL_MARK, Vocabulary

EOS, END, COMMA = 1, 2, 8
PIECES = [
    b"",
    CONTROL_MARK + b"<eos>",
    CONTROL_MARK + b"<end>",
    *(b"a", b"b", b"c", b"ab", b"ba", b",", b"aab", b"bc", b"a"),
    *(bytes([byte]) for byte in "é".encode()),
    b"cc,",
]
VOCABULARY_MESSAGE = VocabularyMessage(
    lengths=array("I", map(len, PIECES)).tobytes(), pieces=b"".join(PIECES), eos_token_id=EOS
)


def make_vocabulary() -> Vocabulary:
    message = VOCABULARY_MESSAGE
    return Vocabulary(message.lengths, message.pieces, message.eos_token_id)


def text_of(token_ids: list[int]) -> bytes:
    return b"".join(PIECES[token_id] for token_id in token_ids)


@dataclass(frozen=True)
class Language:
    grammar: str
    texts: frozenset[bytes]
    """All of them; or, of too many, all that three guesses behind `longest` bytes can reach."""
    longest: int = 100

    @cached_property
    def _beginnings(self) -> frozenset[bytes]:
        return frozenset(text[:end] for text in self.texts for end in range(len(text) + 1))

    @cached_property
    def _proper_beginnings(self) -> frozenset[bytes]:
        return frozenset(text[:end] for text in self.texts for end in range(len(text)))

    def allowed(self, text: bytes, stops: tuple[int, ...]) -> set[int]:
        """The tokens that may follow a text."""
        words = {
            token_id
            for token_id, piece in enumerate(PIECES)
            if piece and not piece.startswith(CONTROL_MARK) and text + piece in self._beginnings
        }
        return (words - set(stops)) | (set(stops) if text in self.texts else set())

    def is_complete(self, text: bytes) -> bool:
        return text in self.texts and text not in self._proper_beginnings


def _repeated(parts: tuple[bytes, ...], least: int, most: int) -> frozenset[bytes]:
    return frozenset(
        b"".join(chosen)
        for count in range(least, most + 1)
        for chosen in itertools.product(parts, repeat=count)
    )


LANGUAGES = {
    "choices": Language('start: "a" | "ab" | "abc" | "é"', frozenset({b"a", b"ab", b"abc", "é".encode()})),
    "regex": Language("start: /(ab|ba|c){1,4}/", _repeated((b"ab", b"ba", b"c"), 1, 4)),
    "nested": Language(
        'start: "a" start "b" | "c"', frozenset(b"a" * n + b"c" + b"b" * n for n in range(40)), longest=8
    ),
    "list": Language(
        'start: item ("," item){0,2}\nitem: /aa?b?/',
        frozenset(
            b",".join(items)
            for count in (1, 2, 3)
            for items in itertools.product((b"a", b"aa", b"ab", b"aab"), repeat=count)
        ),
    ),
    "open": Language("start: /[ab]*/", _repeated((b"a", b"b"), 0, 15), longest=4),
}
