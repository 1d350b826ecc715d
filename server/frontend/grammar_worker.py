"""Compiles grammars to see whether they do: `python -m server.frontend.grammar_worker`, a child of the front.

In a process of its own, since a grammar can take minutes, or recurse until the stack is full, which no Python
code survives. It reads a Vocabulary frame and then grammars, and answers each with a Verdict, until its input
ends. It imports neither torch nor the HTTP side.
"""

from __future__ import annotations

import resource
import sys
import threading
from typing import BinaryIO

import msgspec

from server.engine.grammar.library import GrammarError, Vocabulary
from server.engine.types import Vocabulary as VocabularyMessage

LENGTH_BYTES = 4
_STACK_BYTES = 4 << 20
"""Less than the engine's thread has: what compiles here compiles there."""
_MAX_MEMORY_BYTES = 4 << 30


class Question(msgspec.Struct, frozen=True):
    text: str
    is_gbnf: bool = False
    """Whether the text is to be translated first, from the syntax of llama.cpp's grammars."""


class Verdict(msgspec.Struct, frozen=True):
    grammar: str = ""
    """What was compiled."""
    error: str | None = None


def write_frame(file: BinaryIO, message: msgspec.Struct) -> None:
    payload = msgspec.msgpack.encode(message)
    file.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    file.flush()


def read_frame(file: BinaryIO) -> bytes | None:
    """None at the end of the file."""
    header = file.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    size = int.from_bytes(header, "big")
    payload = file.read(size)
    return payload if len(payload) == size else None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()


def _serve(questions: BinaryIO, verdicts: BinaryIO) -> None:
    payload = read_frame(questions)
    if payload is None:
        return
    message = msgspec.msgpack.decode(payload, type=VocabularyMessage)
    vocabulary = Vocabulary(message.lengths, message.pieces, message.eos_token_id)
    while (payload := read_frame(questions)) is not None:
        write_frame(verdicts, _judge(vocabulary, msgspec.msgpack.decode(payload, type=Question)))


def _judge(vocabulary: Vocabulary, question: Question) -> Verdict:
    try:
        grammar = _from_gbnf(question.text) if question.is_gbnf else question.text
        vocabulary.compile(grammar)
    except GrammarError as error:
        return Verdict(error=str(error))
    return Verdict(grammar)


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark: str = gbnf_to_lark(text)
    except Exception as error:  # the package names none
        raise GrammarError(f"it is not in GBNF: {error}") from error
    return lark


if __name__ == "__main__":
    main()
