"""FunctionGemma's calls found in a text while it is generated, and their arguments as JSON.

START_CALL and ESCAPE, tokens that no text can hold, stand in it as marks: lone surrogates, which no bytes
decode to. Laws:

1. The pieces of text joined are what stands before the first call. Nothing behind a call is text, and no piece
   has a mark.
2. The pieces of a call's arguments joined are the beginning of a JSON object, and all of it once the call is
   whole, if the text is what the grammar allows.
3. Nothing is held back but a call's name. Time is linear in the text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping

from server.frontend.tool_parser import ArgumentPiece, CallBegun, Piece, TextPiece
from server.tokenizer import ESCAPE, START_CALL

CALL_MARK = "\udc01"
ESCAPE_MARK = "\udc02"

_MARKS = re.compile(f"[{CALL_MARK}{ESCAPE_MARK}]")
_STRUCTURE = re.compile(f"[{ESCAPE_MARK}{{}}\\[\\],:]")
_HEAD = "call:"


def marks(function_ids: Mapping[str, int]) -> dict[int, str]:
    """By the ids of the tokens."""
    return {function_ids[START_CALL]: CALL_MARK, function_ids[ESCAPE]: ESCAPE_MARK}


class FunctionCallFinder:
    """Finds where the first call begins in a text that comes in pieces."""

    def text_end(self, text: str) -> int | None:
        """Where the first call begins in `text`, which came next; None if none does."""
        place = text.find(CALL_MARK)
        return None if place < 0 else place


class FunctionCallParser:
    """The text of one choice as pieces. See the laws above."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._head: str | None = None  # what is known of a call before its arguments
        self._arguments: _Arguments | None = None

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and none without its end."""
        return self._num_calls > 0 and self._head is None and self._arguments is None

    def push(self, text: str) -> list[Piece]:
        """`text` is what came next."""
        pieces: list[Piece] = []
        while text:
            if self._arguments is not None:
                json_text, text = self._arguments.push(text)
                if json_text:
                    pieces.append(ArgumentPiece(self._num_calls - 1, json_text))
                if self._arguments.is_complete:
                    self._arguments = None
            elif self._head is not None:
                head, brace, _ = text.partition("{")
                self._head += head
                text = text[len(head) :]
                if brace:
                    name = _MARKS.sub("", self._head).removeprefix(_HEAD)
                    pieces.append(CallBegun(self._num_calls, uuid.uuid4().hex, name))
                    self._num_calls += 1
                    self._head, self._arguments = None, _Arguments()
            else:
                before, mark, text = text.partition(CALL_MARK)
                before = _MARKS.sub("", before)
                if before and not self._num_calls:
                    pieces.append(TextPiece(before))
                if mark:
                    self._head = ""
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, when nothing more can come: nothing that a client could use."""
        return []


class _Arguments:
    """Turns a call's arguments into JSON: strings get their quotes, and so do bare keys."""

    def __init__(self) -> None:
        self.is_complete = False
        self._open: list[str] = []  # brackets
        self._in_string = False
        self._in_key = False  # a bare one
        self._expects_key = False

    def push(self, text: str) -> tuple[str, str]:
        """The JSON of `text`, which came next, and what follows the arguments' last bracket, if that came."""
        parts: list[str] = []
        position = 0
        while position < len(text) and not self.is_complete:
            if self._in_string:
                end = text.find(ESCAPE_MARK, position)
                parts.append(_escaped(text[position : end if end >= 0 else len(text)]))
                if end < 0:
                    return "".join(parts), ""
                parts.append('"')
                self._in_string = False
                position = end + 1
                continue
            found = _STRUCTURE.search(text, position)
            end = found.start() if found is not None else len(text)
            parts.append(self._bare(text[position:end]))
            if found is not None:
                parts.append(self._structure(found[0]))
                end += 1
            position = end
        return "".join(parts), text[position:]

    def _bare(self, text: str) -> str:
        """Of a key, a number, `true`, `false` or `null`."""
        text = _MARKS.sub("", text)
        if self._in_key:
            return _escaped(text)
        if self._expects_key and text.strip():
            self._in_key, self._expects_key = True, False
            return '"' + _escaped(text.lstrip())
        return text

    def _structure(self, character: str) -> str:
        match character:
            case "{" | "[":
                self._open.append(character)
                self._expects_key = character == "{"
            case "}" | "]":
                self._open.pop()
                self.is_complete = not self._open
                self._expects_key = False
            case ",":
                self._expects_key = self._open[-1] == "{"
            case ":" if self._in_key:
                self._in_key = False
                return '":'
            case _ if character == ESCAPE_MARK:
                self._in_string, self._expects_key = True, False
                return '"'
        return character


def _escaped(text: str) -> str:
    """As it stands between the quotes of a JSON string."""
    return json.dumps(_MARKS.sub("", text), ensure_ascii=False)[1:-1]
