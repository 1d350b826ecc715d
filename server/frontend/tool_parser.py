"""Calls found in a text while it is generated. Time is linear in the text, and nothing of it is evaluated.

Laws:
1. Text is held back only while it may be the beginning of a call: at most LONGEST_HELD characters.
2. The pieces of text joined are what stands before the first call, without a fence or spaces right before it.
   Nothing behind a call is text.
3. The pieces of a call's arguments joined are its JSON object, character for character.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.frontend.tool_grammar import CALL_HEAD


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    call_index: int
    """Among those of the turn, from 0."""
    id: str
    """Hexadecimal, and unique; dialects put their own prefix before it."""
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentPiece:
    call_index: int
    text: str


Piece = TextPiece | CallBegun | ArgumentPiece


def _nested(atoms: Sequence[str]) -> str:
    """A pattern for every beginning of what the atoms match one after another."""
    pattern = ""
    for atom in reversed(atoms):
        pattern = f"(?:{atom}{pattern})?"
    return pattern


# What models put right before a call: a fence, the bracket of a list.
_OPENING = r"\s{0,16}(?:```[a-z_]{0,16}\s{0,8})?(?:\[\s{0,8})?"
_SPACES = r"[ \t\r\n]"
_HEAD_ATOMS = [
    r"\{",
    _SPACES + "{0,16}",
    *'"name"',
    _SPACES + "{0,4}",
    ":",
    _SPACES + "{0,4}",
    '"',
    r"[A-Za-z0-9_-]{1,128}",
]  # CALL_HEAD and a name
_UNFINISHED = re.compile(rf"(?:\s{{0,16}}`{{1,2}}|{_OPENING}{_nested(_HEAD_ATOMS)})\Z")
LONGEST_HELD = 16 + (3 + 16 + 8) + (1 + 8) + (1 + 16 + 6 + 4 + 1 + 4 + 1 + 128)
"""The most that `_UNFINISHED` can match."""

_STRUCTURE = re.compile(r'["\\{}\[\]]')


class CallFinder:
    """Finds where calls begin in a text that comes in pieces."""

    def __init__(self, names: Iterable[str]) -> None:
        alternatives = "|".join(map(re.escape, sorted(names)))
        self._begun = re.compile(f'{_OPENING}{CALL_HEAD}({alternatives})"')
        self.held = ""
        """The end of the text so far, as far as a call may have begun in it."""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """What is certain about the text that was held and `text`: what comes before a call, the name of the
        call that begins there, if one does, and what follows its name."""
        text = self.held + text
        found = self._begun.search(text)
        if found is not None:
            self.held = ""
            return text[: found.start()], found[1], text[found.end() :]
        unfinished = _UNFINISHED.search(text, max(0, len(text) - LONGEST_HELD))
        assert unfinished is not None
        self.held = unfinished[0]
        return text[: unfinished.start()], None, ""

    def text_end(self, text: str) -> int | None:
        """As `push`: the place in `text` behind the name of the call that begins there, if one does."""
        _, name, rest = self.push(text)
        return None if name is None else len(text) - len(rest)


class CallParser:
    """The text of one choice as pieces. See the laws above."""

    def __init__(self, names: Iterable[str]) -> None:
        self._finder = CallFinder(names)
        self._num_calls = 0
        self._in_call = False
        self._depth = 0  # of the arguments' JSON; 0 before they begin
        self._in_string = False
        self._is_escaped = False

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and none without its end."""
        return self._num_calls > 0 and not self._in_call

    def push(self, text: str) -> list[Piece]:
        """`text` is what came next."""
        pieces: list[Piece] = []
        while text:
            if self._in_call:
                text = self._read_arguments(text, pieces)
                continue
            before, name, text = self._finder.push(text)
            if before and not self._num_calls:
                pieces.append(TextPiece(before))
            if name is not None:
                pieces.append(CallBegun(self._num_calls, uuid.uuid4().hex, name))
                self._num_calls += 1
                self._in_call = True
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, when nothing more can come."""
        held, self._finder.held = self._finder.held, ""
        return [TextPiece(held)] if held and not self._num_calls else []

    def _read_arguments(self, text: str, pieces: list[Piece]) -> str:
        """Takes the arguments from `text`; returns what follows them, if they end in it."""
        start = 0
        if self._depth == 0:
            start = text.find("{")
            if start < 0:
                return ""
        end = self._arguments_end(text, start)
        pieces.append(ArgumentPiece(self._num_calls - 1, text[start:end]))
        if self._depth == 0:
            self._in_call = False
        return text[end:]

    def _arguments_end(self, text: str, start: int) -> int:
        """The place behind the arguments' last bracket, or the end of `text`."""
        position = start
        if self._is_escaped:
            position, self._is_escaped = position + 1, False
        while (found := _STRUCTURE.search(text, position)) is not None:
            position = found.end()
            character = found[0]
            if character == "\\":
                if self._in_string:
                    self._is_escaped = position == len(text)
                    position += 1
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    return position
        return len(text)
