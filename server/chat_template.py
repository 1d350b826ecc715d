"""Chat messages to Gemma's turn format.

The format is that of the official templates of Gemma 1, 2 and 3, which agree on everything they both allow:

    <bos><start_of_turn>user\\nTEXT<end_of_turn>\\n<start_of_turn>model\\nTEXT<end_of_turn>\\n<start_of_turn>model\\n

Laws:
1. Control tokens come from here alone. A message's text is encoded as text, so nothing typed in it can end its
   turn or begin another.
2. Where the official template answers, the rendering is its own (but for law 1). Where it raises or drops text,
   the rules of `render_chat` apply, and `RenderedChat.notes` says what was done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from server.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer
from server.tool_format import ToolCall, call_text, result_text

ALLOWED_ROLES = ("system", "developer", "user", "assistant", "tool")

_PARAGRAPH = "\n\n"
_OURS = -1
"""The index of an instruction that is no message of the client's."""
_LONGEST_SHOWN_ID = 64


class ChatTemplateError(ValueError):
    """The messages cannot be rendered. `param` names the offending field, or is None if none is at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    """One of ALLOWED_ROLES."""
    text: str
    calls: tuple[ToolCall, ...] = ()
    """Of an assistant's message: what it called, after its text."""
    call_id: str = ""
    """Of a tool's message: the call whose result it is."""


@dataclass(frozen=True, slots=True)
class ControlToken:
    id: int
    piece: str


@dataclass(frozen=True, slots=True)
class RenderedChat:
    segments: tuple[ControlToken | str, ...]
    """Control tokens and, between them, texts; no two texts are neighbours."""
    notes: tuple[str, ...]
    """What was folded or merged, in sentences for people."""

    @property
    def text(self) -> str:
        """The prompt as one string. Encoding this string instead of the segments would break law 1."""
        return "".join(segment if isinstance(segment, str) else segment.piece for segment in self.segments)

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt's ids, `<bos>` included. Raises InvalidTextError."""
        ids: list[int] = []
        for segment in self.segments:
            if isinstance(segment, str):
                ids += tokenizer.encode_text(segment)
            else:
                ids.append(segment.id)
        return ids


def render_chat(
    messages: Sequence[ChatMessage],
    tokenizer: Tokenizer,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    declarations: str = "",
) -> RenderedChat:
    """Render a conversation, with the beginning of the model's answer if `add_generation_prompt`; or, if
    `continue_final_message`, up to the end of the last message's text, which must be the assistant's.

    `declarations` tells the model of its tools; it begins the first user turn.

    - Gemma has no system role: system and developer texts, joined by an empty line, precede the text of the
      next user message; where none follows they are a user turn of their own.
    - Neighbouring turns of one role become one turn, joined by an empty line.
    - The conversation may begin with an assistant message.
    - Tool calls are lines of the model's turn, and their results are text of the user turn that follows.
    - Texts are trimmed, but for system texts that precede a user's, as in the official Gemma 3 template.

    Raises ChatTemplateError for an empty list, an unknown role, a result without its call, or a tokenizer
    without turn tokens.
    """
    bos, start, end = control_tokens(tokenizer)
    turns, notes = _turns(messages, declarations)
    segments: list[ControlToken | str] = [bos]
    for turn in turns:
        segments += [start, f"{turn.role}\n{turn.text}", end, "\n"]
    if continue_final_message:
        check_goes_on(messages)
        del segments[-2:]
    elif add_generation_prompt:
        segments += [start, "model\n"]
    return RenderedChat(tuple(segments), tuple(notes))


def join_text_parts(texts: Iterable[str]) -> str:
    """The text of a message whose content is a list of text parts, as the official Gemma 3 template joins them:
    each trimmed, nothing between them."""
    return "".join(text.strip() for text in texts)


def control_tokens(tokenizer: Tokenizer) -> tuple[ControlToken, ControlToken, ControlToken]:
    """Those of a conversation's beginning, and of a turn's beginning and end. Raises ChatTemplateError."""
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    if start is None or end is None:
        raise ChatTemplateError(
            f"this model cannot be chatted with: its tokenizer has no {START_OF_TURN} and {END_OF_TURN} tokens"
        )
    return (
        ControlToken(tokenizer.bos_id, BOS),
        ControlToken(start, START_OF_TURN),
        ControlToken(end, END_OF_TURN),
    )


def check_goes_on(messages: Sequence[ChatMessage]) -> None:
    """Raises ChatTemplateError if the last message is not one that the model can go on with."""
    if messages[-1].role != "assistant":
        raise ChatTemplateError(
            f'continue_final_message needs a last message of the assistant, not of "{messages[-1].role}"',
            param="continue_final_message",
        )


def orphan_error(call_id: str, index: int) -> ChatTemplateError:
    """For the result `messages[index]`, whose call is missing."""
    param = f"messages[{index}].tool_call_id"
    return ChatTemplateError(
        f"{param} is {call_id[:_LONGEST_SHOWN_ID]!a}, but no assistant message before it has a tool call of "
        "that id; send the message with the call, too",
        param,
    )


def role_error(role: str, index: int) -> ChatTemplateError:
    """For `messages[index]`, of an unknown role."""
    param = f"messages[{index}].role"
    return ChatTemplateError(f'{param} is "{role}"; it must be one of {", ".join(ALLOWED_ROLES)}', param)


@dataclass(slots=True)
class _Turn:
    role: Literal["user", "model"]
    parts: list[str]
    """Paragraphs, joined only at the end: there may be thousands."""
    first_index: int
    """Of the message that began it."""

    @property
    def text(self) -> str:
        return _PARAGRAPH.join(part for part in self.parts if part)


@dataclass(frozen=True, slots=True)
class _Call:
    """One that was made, among those of its turn."""

    name: str
    number: int
    total: int


def _turns(messages: Sequence[ChatMessage], declarations: str) -> tuple[list[_Turn], list[str]]:
    if not messages:
        raise ChatTemplateError("messages must hold at least one message, not 0", param="messages")
    turns: list[_Turn] = []
    notes: list[str] = []
    instructions: list[tuple[int, ChatMessage]] = []  # system texts that wait for a user's message
    if declarations:
        instructions.append((_OURS, ChatMessage("system", declarations)))
    calls: dict[str, _Call] = {}

    def append(role: Literal["user", "model"], text: str, index: int) -> None:
        if turns and turns[-1].role == role:
            turn = turns[-1]
            turn.parts.append(text)
            if index != _OURS:
                notes.append(
                    f"messages[{index}] was merged into the {role} turn of messages[{turn.first_index}]"
                )
        else:
            turns.append(_Turn(role, [text], index))

    for index, message in enumerate(messages):
        match message.role:
            case "system" | "developer":
                instructions.append((index, message))
            case "user":
                prefix = "".join(instruction.text + _PARAGRAPH for _, instruction in instructions)
                notes += [
                    f"messages[{number}] ({folded.role}) was folded into the user turn of messages[{index}]"
                    for number, folded in instructions
                    if number != _OURS
                ]
                instructions.clear()
                append("user", prefix + message.text.strip(), index)
            case "assistant":
                append("model", _with_calls(message), index)
                total = len(message.calls)
                calls |= {
                    call.id: _Call(call.name, number, total)
                    for number, call in enumerate(message.calls, start=1)
                }
            case "tool":
                call = calls.get(message.call_id)
                if call is None:
                    raise orphan_error(message.call_id, index)
                append(
                    "user", result_text(call.name, message.text, number=call.number, total=call.total), index
                )
            case _:
                raise role_error(message.role, index)
    if instructions:
        theirs = [(index, message) for index, message in instructions if index != _OURS]
        notes += [f"messages[{index}] ({message.role}) became a user turn" for index, message in theirs]
        text = _PARAGRAPH.join(message.text for _, message in instructions).strip()
        append("user", text, theirs[0][0] if theirs else _OURS)
    return turns, notes


def _with_calls(message: ChatMessage) -> str:
    parts = [message.text.strip(), *(call_text(call) for call in message.calls)]
    return "\n".join(part for part in parts if part)
