"""What a grammar allows, by llguidance itself and byte by byte."""

from __future__ import annotations

from llguidance import LLMatcher, LLTokenizer

BYTES = LLTokenizer("byte")


def accepts(grammar: str | None, text: str) -> bool:
    """Whether `text` is all that the grammar asks for."""
    assert grammar is not None
    matcher = LLMatcher(BYTES, grammar)
    data = list(text.encode())
    num_taken = matcher.try_consume_tokens(data)
    assert num_taken == len(data) or not matcher.is_error(), matcher.get_error()
    return num_taken == len(data) and matcher.is_accepting()
