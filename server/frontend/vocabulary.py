"""The tokenizer's pieces in the form that grammars are matched against."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from server.engine.types import Vocabulary
from server.grammar_library import CONTROL_MARK
from server.tokenizer import Tokenizer


def make_vocabulary(tokenizer: Tokenizer, num_tokens: int) -> Vocabulary:
    """All pieces; takes some tenths of a second. num_tokens: rows of the model's embedding."""
    controls = tokenizer.control_token_ids
    return _vocabulary(
        tokenizer,
        (
            (CONTROL_MARK if token_id in controls else b"") + tokenizer.token_bytes(token_id)
            for token_id in range(num_tokens)
        ),
    )


def make_byte_vocabulary(tokenizer: Tokenizer, num_tokens: int) -> Vocabulary:
    """The control tokens in their places and a token for each byte, to see whether a grammar compiles."""
    pieces = [b""] * num_tokens
    for token_id in tokenizer.control_token_ids:
        if token_id < num_tokens:
            pieces[token_id] = CONTROL_MARK + tokenizer.token_bytes(token_id)
    others = (token_id for token_id in range(num_tokens) if token_id not in tokenizer.control_token_ids)
    for byte, token_id in zip(range(256), others, strict=False):
        pieces[token_id] = bytes([byte])
    return _vocabulary(tokenizer, pieces)


def _vocabulary(tokenizer: Tokenizer, pieces: Iterable[bytes]) -> Vocabulary:
    whole = list(pieces)
    return Vocabulary(array("I", map(len, whole)).tobytes(), b"".join(whole), tokenizer.eos_id)
