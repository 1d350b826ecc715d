"""Compiles grammars to see whether they do: `python -m server.frontend.grammar_worker`, a child of the front.

In a process of its own, since a grammar can take minutes, or recurse until the stack is full, which no process
survives. It reads a Vocabulary and then Questions, and answers each with a Verdict, until its input ends. It
imports neither torch nor the HTTP side.
"""

from __future__ import annotations

import enum
import os
import resource
import sys
import threading
from array import array
from typing import IO

import msgspec

from server.engine.types import Vocabulary as VocabularyMessage
from server.grammar_library import GrammarError, Vocabulary

LENGTH_BYTES = 4
_STACK_BYTES = 4 << 20
"""Less than the engine's thread has: what compiles here compiles there."""
_MAX_MEMORY_BYTES = 4 << 30


class Syntax(enum.StrEnum):
    NATIVE = "native"
    """As SamplingParams.grammar has it."""
    REGEX = "regex"
    """For the whole text, as Rust's regex package has them."""
    GBNF = "gbnf"
    """llama.cpp's."""


class Question(msgspec.Struct, frozen=True):
    text: str
    syntax: Syntax = Syntax.NATIVE


class Verdict(msgspec.Struct, frozen=True):
    grammar: str = ""
    """What was compiled, as SamplingParams.grammar has it."""
    error: str | None = None


def write_frame(file: IO[bytes], message: msgspec.Struct) -> None:
    payload = msgspec.msgpack.encode(message)
    file.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes | None:
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


def _serve(questions: IO[bytes], verdicts: IO[bytes]) -> None:
    payload = read_frame(questions)
    if payload is None:
        return
    message = msgspec.msgpack.decode(payload, type=VocabularyMessage)
    vocabulary = Vocabulary(message.lengths, message.pieces, message.eos_token_id)
    mask = array("I", bytes(4 * ((vocabulary.size + 31) // 32)))
    # When the library panics it prints why, and may quote the grammar: a client's text, which no log gets.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    write_frame(verdicts, Verdict())  # ready
    while (payload := read_frame(questions)) is not None:
        write_frame(verdicts, _judge(vocabulary, mask, msgspec.msgpack.decode(payload, type=Question)))


def _judge(vocabulary: Vocabulary, mask: array[int], question: Question) -> Verdict:
    try:
        grammar = _native(question)
        # A grammar that no text matches compiles, too, as does one that is too ambiguous: the first mask tells.
        vocabulary.compile(grammar).fill_mask(mask.buffer_info()[0], len(mask) * mask.itemsize)
    except GrammarError as error:
        return Verdict(error=str(error))
    return Verdict(grammar)


def _native(question: Question) -> str:
    # The package's Python half, of which the rest of the server needs nothing.
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    match question.syntax:
        case Syntax.REGEX:
            return LLMatcher.grammar_from_regex(question.text)
        case Syntax.GBNF:
            try:
                return gbnf_to_lark(question.text)
            except Exception as error:  # the package names none
                raise GrammarError(f"it is not in GBNF: {error}") from error
    return question.text


if __name__ == "__main__":
    main()
