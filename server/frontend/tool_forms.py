"""The forms in which models are told of tools and write calls: two, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from server.chat_template import ChatMessage, RenderedChat, render_chat
from server.frontend import function_gemma_grammar, function_gemma_parser, tool_grammar
from server.frontend.detokenizer import NO_MARKS
from server.frontend.function_gemma_parser import FunctionCallFinder, FunctionCallParser
from server.frontend.tool_grammar import Instead
from server.frontend.tool_parser import CallFinder, CallParser, Piece
from server.function_gemma_template import render_function_chat
from server.tokenizer import Tokenizer
from server.tool_format import Tool, declarations_text


class Finder(Protocol):
    def text_end(self, text: str) -> int | None:
        """Where in `text`, which came next, a call has begun, if one has."""


class Parser(Protocol):
    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and none without its end."""

    def push(self, text: str) -> list[Piece]:
        """`text` is what came next."""

    def finish(self) -> list[Piece]:
        """What was held back, when nothing more can come."""


class ToolForm(ABC):
    marks: Mapping[int, str] = NO_MARKS
    """What stands for control tokens in the text that a finder and a parser read."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[ChatMessage],
        tokenizer: Tokenizer,
        tools: Sequence[Tool],
        *,
        is_parallel: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> RenderedChat:
        """The conversation, with the declarations of `tools`. Raises ChatTemplateError."""

    @abstractmethod
    def turn_grammar(
        self, tools: Sequence[Tool], loose: Collection[str], *, is_parallel: bool, instead: Instead
    ) -> str:
        """What a turn with calls of `tools` must match, in llguidance's Lark. Raises GrammarError.

        `loose`: names of tools whose arguments are held to what a grammar can express of their schemas.
        """

    @abstractmethod
    def arguments_grammar(self, parameters: dict[str, Any], *, is_loose: bool) -> str:
        """What a call's arguments alone must match. Raises GrammarError."""

    @abstractmethod
    def finder(self, names: Collection[str]) -> Finder: ...

    @abstractmethod
    def parser(self, names: Collection[str]) -> Parser: ...


class JsonForm(ToolForm):
    """Text, for models without tokens for tools."""

    def render(
        self,
        messages: Sequence[ChatMessage],
        tokenizer: Tokenizer,
        tools: Sequence[Tool],
        *,
        is_parallel: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> RenderedChat:
        declarations = declarations_text(tools, is_parallel=is_parallel) if tools else ""
        return render_chat(messages, tokenizer, add_generation_prompt, continue_final_message, declarations)

    def turn_grammar(
        self, tools: Sequence[Tool], loose: Collection[str], *, is_parallel: bool, instead: Instead
    ) -> str:
        return tool_grammar.turn_grammar(tools, loose, is_parallel=is_parallel, instead=instead)

    def arguments_grammar(self, parameters: dict[str, Any], *, is_loose: bool) -> str:
        return tool_grammar.arguments_grammar(parameters, is_loose=is_loose)

    def finder(self, names: Collection[str]) -> Finder:
        return CallFinder(names)

    def parser(self, names: Collection[str]) -> Parser:
        return CallParser(names)


class FunctionGemmaForm(ToolForm):
    """FunctionGemma's own. A token begins a call, and the grammar holds to its tool what follows."""

    def __init__(self, function_ids: Mapping[str, int]) -> None:
        self.marks = function_gemma_parser.marks(function_ids)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tokenizer: Tokenizer,
        tools: Sequence[Tool],
        *,
        is_parallel: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> RenderedChat:
        return render_function_chat(messages, tokenizer, add_generation_prompt, continue_final_message, tools)

    def turn_grammar(
        self, tools: Sequence[Tool], loose: Collection[str], *, is_parallel: bool, instead: Instead
    ) -> str:
        return function_gemma_grammar.turn_grammar(tools, loose, is_parallel=is_parallel, instead=instead)

    def arguments_grammar(self, parameters: dict[str, Any], *, is_loose: bool) -> str:
        return function_gemma_grammar.arguments_grammar(parameters, is_loose=is_loose)

    def finder(self, names: Collection[str]) -> Finder:
        return FunctionCallFinder()

    def parser(self, names: Collection[str]) -> Parser:
        return FunctionCallParser()


JSON_FORM = JsonForm()


def form_of(tokenizer: Tokenizer) -> ToolForm:
    """That of the models with this tokenizer."""
    return FunctionGemmaForm(tokenizer.function_ids) if tokenizer.function_ids else JSON_FORM
