"""Chat messages to FunctionGemma's turn format, as the official template of that checkpoint has it:

    <bos><start_of_turn>developer\\nTEXT DECLARATIONS<end_of_turn>\\n<start_of_turn>user\\nTEXT<end_of_turn>\\n
    <start_of_turn>model\\nTEXT CALLS RESPONSES TEXT<end_of_turn>\\n

without anything between what is shown apart here. The laws are those of `chat_template`. The official
template puts a user's words into the model's turn if a result precedes them, and leaves a turn without its end
if results are missing; here, every turn is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from itertools import groupby

from server.chat_template import (
    ChatMessage,
    ChatTemplateError,
    RenderedChat,
    check_goes_on,
    control_tokens,
    orphan_error,
    role_error,
)
from server.function_gemma_format import SegmentWriter
from server.tokenizer import BOS, END_OF_TURN, START_OF_TURN, START_RESPONSE, Tokenizer
from server.tool_format import Tool

TRIGGER = "You are a model that can do function calling with the following functions"
"""Google's words for "here are functions", without which this model hardly calls any."""

_PARAGRAPH = "\n\n"
_INSTRUCTING = ("system", "developer")


def render_function_chat(
    messages: Sequence[ChatMessage],
    tokenizer: Tokenizer,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Tool] = (),
) -> RenderedChat:
    """As `chat_template.render_chat`, for a tokenizer that has `function_ids`.

    - The developer's turn holds the system and developer texts that the conversation begins with, joined by
      an empty line, TRIGGER, unless they hold it, and the declarations of `tools`. Later ones are turns.
    - Results stand in the order of their calls in the model's turn that made these, which goes on behind them
      with the next message of the assistant or with what is generated. Any other message ends the turn first.
    - All texts are trimmed.
    """
    if not messages:
        raise ChatTemplateError("messages must hold at least one message, not 0", param="messages")
    control_tokens(tokenizer)  # or it cannot be chatted with
    conversation = _Conversation(tokenizer)
    num_instructions = _num_instructions(messages)
    instructions = [message.text.strip() for message in messages[:num_instructions]]
    notes = [
        f"messages[{index}] ({messages[index].role}) was folded into the developer turn of messages[0]"
        for index in range(1, num_instructions)
    ]
    if tools or instructions:
        conversation.developer(_PARAGRAPH.join(instructions), tools)
    for is_result, group in groupby(
        enumerate(messages[num_instructions:], start=num_instructions), lambda item: item[1].role == "tool"
    ):
        if is_result:
            conversation.results(list(group))
            continue
        for index, message in group:
            match message.role:
                case "system" | "developer":
                    conversation.turn("developer", message.text)
                case "user":
                    conversation.turn("user", message.text)
                case "assistant":
                    conversation.model(message)
                case _:
                    raise role_error(message.role, index)
    if continue_final_message:
        check_goes_on(messages)
    else:
        conversation.finish(add_generation_prompt=add_generation_prompt)
    return RenderedChat(conversation.writer.segments(), tuple(notes))


def _num_instructions(messages: Sequence[ChatMessage]) -> int:
    roles = (index for index, message in enumerate(messages) if message.role not in _INSTRUCTING)
    return next(roles, len(messages))


class _Last(Enum):
    """What the open turn ends with, so far."""

    TEXT = auto()
    CALLS = auto()
    RESULTS = auto()


class _Conversation:
    """Writes turns. Each is ended when the next begins, since results may go on with it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.writer = SegmentWriter(tokenizer)
        self.writer.token(BOS)
        self._last: _Last | None = None
        self._called: dict[str, tuple[int, str]] = {}
        """Call ids to the number of the call, among all, and its name."""

    def developer(self, text: str, tools: Sequence[Tool]) -> None:
        needs_trigger = tools and TRIGGER not in text
        self.turn("developer", "\n".join([text] * bool(text) + [TRIGGER] * bool(needs_trigger)))
        for tool in tools:
            self.writer.declaration(tool)

    def turn(self, role: str, text: str) -> None:
        self._begin(role)
        self.writer.text(text.strip())

    def model(self, message: ChatMessage) -> None:
        if self._last is not _Last.RESULTS:
            self._begin("model")
        self.writer.text(message.text.strip())
        for call in message.calls:
            self._called[call.id] = (len(self._called), call.name)
            self.writer.call(call)
        self._last = _Last.CALLS if message.calls else _Last.TEXT

    def results(self, messages: Sequence[tuple[int, ChatMessage]]) -> None:
        """`messages`: with their indices."""
        for index, message in messages:
            if message.call_id not in self._called:
                raise orphan_error(message.call_id, index)
        if self._last not in (_Last.CALLS, _Last.RESULTS):
            self._begin("model")
        for _, message in sorted(messages, key=lambda item: self._called[item[1].call_id]):
            self.writer.result(self._called[message.call_id][1], message.text)
        self._last = _Last.RESULTS

    def finish(self, *, add_generation_prompt: bool) -> None:
        if self._last is _Last.RESULTS:
            return
        if add_generation_prompt:
            self._begin("model")
        elif self._last is _Last.CALLS:
            self.writer.token(START_RESPONSE)
        else:
            self._end()

    def _begin(self, role: str) -> None:
        if self._last is not None:
            self._end()
        self.writer.token(START_OF_TURN)
        self.writer.text(f"{role}\n")
        self._last = _Last.TEXT

    def _end(self) -> None:
        self.writer.token(END_OF_TURN)
        self.writer.text("\n")
