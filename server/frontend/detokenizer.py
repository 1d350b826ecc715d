"""Token ids to text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from server.tokenizer import BYTE_REPLACEMENT, Tokenizer

NO_MARKS: Mapping[int, str] = MappingProxyType({})

_UTF8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns the ids of one sequence into text as they come. Laws:

    - The concatenation of all that `push` and `finish` return equals `Tokenizer.decode` of all the ids, with
      marks in the place of the tokens that have one.
    - A character is returned when its last byte arrived; at most three bytes are ever held back.
    - The work for one token does not depend on how many came before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        marks: Mapping[int, str] = NO_MARKS,
    ) -> None:
        """`marks`: what stands in the text for certain tokens, such as none can be part of."""
        self._tokenizer = tokenizer
        self._marks = marks
        self._silent_ids = tokenizer.control_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = _UTF8Decoder(BYTE_REPLACEMENT)

    @property
    def has_incomplete_character(self) -> bool:
        """Whether bytes are held back."""
        return self._decoder.getstate()[0] != b""

    def whole(self, token_ids: Iterable[int]) -> str | None:
        """The text that these tokens complete, if each of them begins and ends with a character; None, and
        nothing has changed, if one of them needs `push`."""
        if self.has_incomplete_character:
            return None
        texts = []
        for token_id in token_ids:
            if token_id in self._marks:
                return None
            if token_id in self._silent_ids:
                continue
            text = self._tokenizer.whole_text(token_id)
            if text is None:
                return None
            texts.append(text)
        return "".join(texts)

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; may be empty."""
        if token_id in self._marks:
            return self.finish() + self._marks[token_id]
        if token_id in self._silent_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: a U+FFFD for each byte of a character that never got complete."""
        return self._decoder.decode(b"", final=True)
